"""The same step beside plain loops: open_clip's loss, lightly's SimCLR, torchvision one image at a time.

The towers, the precision, the images and the augmentations are the same. The loops are what one writes first: the sample is made
in `__getitem__`, PyTorch's own collate makes the batch, every report is padded to the encoder's limit, and Adam is PyTorch's default.
"""
from itertools import count

import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .cases import Case, Options, line, same, same_gradients
from .steps import QUICK
from .versions import (
    OURS,
    Trainer,
    arm_of,
    copy_weights,
    inputs_of,
    loss_and_gradients,
    pair_trainer,
    plain_batches,
    reference,
    settings_of,
    view_trainer,
)


class NotInstalled(ImportError):
    "A package that only the benchmarks want is missing."


def table_2(settings, stage: str) -> v2.Compose:
    "The augmentations of a stage, by torchvision, for one image."
    s = {key.removeprefix(f"{stage}_"): value for key, value in settings if key.startswith(f"{stage}_")}
    limits, brightness = (1 - s["scaling"], 1 + s["scaling"]), s["brightness"]
    steps = [v2.RandomAffine(s["rotation"], (s["translation"] / 512,) * 2, limits, s["shear"] or None, v2.InterpolationMode.BILINEAR),
             v2.ColorJitter(brightness=brightness), v2.RandomHorizontalFlip(s["flip"]),
             v2.RandomApply([v2.GaussianNoise(sigma=s["noise"])], s["noise_p"])]
    if s["blur_p"]:
        widths = [sigma * settings.image_size / 512 for sigma in s["blur_sigma"]]
        steps.append(v2.RandomApply([v2.RandomChoice([v2.GaussianBlur(2 * int(3 * width + 0.999) + 1, width) for width in widths])], s["blur_p"]))
    return v2.Compose(steps)


class PlainPairs(Dataset):
    "An image, and its report's tokens up to the limit of the encoder."

    def __init__(self, inputs, settings, transform):
        self.inputs, self.transform = inputs, transform
        texts, options = inputs.studies.impression.tolist(), {"padding": "max_length", "truncation": True, "max_length": settings.max_tokens}
        self.tokens = inputs.tokenizer(texts, return_token_type_ids=False, return_tensors="pt", **options)

    def __len__(self):
        return len(self.inputs.studies)

    def __getitem__(self, index):
        image = torch.from_numpy(self.inputs.store[self.inputs.studies.image.iloc[index]])[None].float() / 255
        return self.transform(image), self.tokens["input_ids"][index], self.tokens["attention_mask"][index]


class PlainImages(Dataset):
    "What a transform makes of an image."

    def __init__(self, inputs, transform):
        self.inputs, self.transform = inputs, transform

    def __len__(self):
        return len(self.inputs.studies)

    def __getitem__(self, index):
        return self.transform(torch.from_numpy(self.inputs.store[self.inputs.studies.image.iloc[index]])[None].float() / 255)


class Loop:
    "A plain training loop: each call is a step, loading included."

    def __init__(self, dataset, settings, loss, modules, device: str):
        self.loss, self.device = loss, device  # batch -> a scalar
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.Adam(parameters, settings.lr, settings.betas)
        loader = DataLoader(dataset, settings.batch_size, shuffle=True, drop_last=True, num_workers=settings.workers)
        self.batches = (batch for _ in count() for batch in loader)

    def __call__(self) -> float:
        batch = next(self.batches)
        loss = self.loss([part.to(self.device) for part in batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def clip_loss(model, tau: float):
    "InfoNCE of a batch, by open_clip."
    criterion = ClipLoss()
    def loss(batch):
        images, ids, mask = batch
        images, texts = model.embed_images(images), model.embed_texts({"input_ids": ids, "attention_mask": mask})
        return criterion(normalize(images.pooled, dim=-1), normalize(texts.pooled, dim=-1), 1 / tau)
    return loss


def gradients_of(loss, module) -> dict[str, torch.Tensor]:
    "The gradients of a scalar by the module's parameters, which are left without."
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@line("step-open_clip")
def beside_open_clip(options: Options) -> Case:
    "The demo's baseline."
    theirs, changes = reference(), {"precision": "float32"} | options.pick({}, QUICK)
    settings, own_settings = (settings_of(version, options.device, "demo", **changes) for version in (theirs, OURS))
    inputs, own_inputs = inputs_of(theirs, settings, options.pick(200, 12)), inputs_of(OURS, own_settings, options.pick(200, 12))
    ours = pair_trainer(OURS, own_settings, arm_of(OURS, "baseline"), own_inputs)
    towers = pair_trainer(theirs, settings, arm_of(theirs, "baseline"), inputs).objective  # plain BERT and timm
    copy_weights(towers, ours.objective)
    loss = clip_loss(towers.model, settings.tau)
    plain = Loop(PlainPairs(inputs, settings, table_2(settings, "vlm")), settings, loss, [towers], options.device)

    def check() -> str:
        (batch,) = plain_batches(theirs, settings, arm_of(theirs, "baseline"), inputs, 1)
        own_loss, own_gradients = loss_and_gradients(ours, [batch])
        pairs = PlainPairs(inputs, settings, v2.Identity())
        rows = [inputs.studies.study_id.tolist().index(name) for name in batch["study_id"]]
        towers.model.text_encoder.eval()  # no dropout
        expected = loss([torch.stack(part).to(options.device) for part in zip(*(pairs[row] for row in rows), strict=True)])
        same("loss", own_loss, expected, 1e-5)
        same_gradients(own_gradients, gradients_of(expected, towers), 1e-3)
        towers.train()
        return f"loss and {len(own_gradients)} gradients"

    return Case("plain loop, open_clip's loss", plain, {"ours": ours}, check, threads=settings.threads,
                targets={"ours": 0.7 if options.device == "cpu" else 0.5}, warmup=2)


@line("step-lightly")
def beside_lightly(options: Options) -> Case:
    "Stage 1 of the demo's images."
    try:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead
        from lightly.transforms.multi_view_transform import MultiViewTransform
    except ImportError as error:
        raise NotInstalled(f"lightly is missing ({error}): pip install --no-deps lightly lightning-utilities") from None
    theirs, changes = reference(), {"precision": "float32"} | options.pick({}, QUICK | {"simclr_batch_size": 4})
    settings, own_settings = (version.settings.in_stage(settings_of(version, options.device, "demo", **changes), "simclr") for version in (theirs, OURS))
    inputs, own_inputs = (inputs_of(version, s, options.pick(200, 12)) for version, s in ((theirs, settings), (OURS, own_settings)))
    ours, towers = view_trainer(OURS, own_settings, own_inputs), view_trainer(theirs, settings, inputs).objective
    copy_weights(towers, ours.objective)
    first, last = towers.head[0], towers.head[2]
    head = SimCLRProjectionHead(first.in_features, first.out_features, last.out_features, batch_norm=False).to(options.device)
    head.layers.load_state_dict(towers.head.state_dict())
    criterion, encoder = NTXentLoss(settings.simclr_tau), towers.image_encoder

    def loss(views):
        return criterion(*(head(encoder.features(view).mean(1)) for view in views))

    transform = MultiViewTransform([table_2(settings, "simclr")] * 2)
    plain = Loop(PlainImages(inputs, transform), settings, loss, [encoder.backbone, head], options.device)
    return Case("plain loop, lightly's loss and head", plain, {"ours": ours}, lambda: check_views(ours, encoder, head, criterion, inputs, settings),
                threads=settings.threads, rounds=10, targets={"ours": 0.7 if options.device == "cpu" else 0.5})


def check_views(ours: Trainer, encoder, head, criterion, inputs, settings) -> str:
    "The same two views of each image; BatchNorm sees both at once on our side, so its statistics are frozen on both."
    device, images = ours.accelerator.device, PlainImages(inputs, table_2(settings, "simclr"))
    views = torch.stack([torch.stack([images[row] for row in range(settings.batch_size)]) for _ in range(2)]).to(device)
    ours.objective.eval()
    encoder.eval()
    own_loss = ours.objective({"views": views})["simclr"]
    expected = criterion(*(head(encoder.features(view).mean(1)) for view in views))
    same("loss", own_loss, expected, 1e-5)
    own, theirs = gradients_of(own_loss, ours.objective.image_encoder.backbone), gradients_of(expected, encoder.backbone)
    same_gradients(own, theirs, 1e-3)
    ours.objective.train()
    encoder.train()
    return f"loss and {len(own)} gradients, BatchNorm frozen"
