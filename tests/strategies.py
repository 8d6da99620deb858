"""What hypothesis draws from, in more than one test file."""
from hypothesis import strategies as st

from cxrvlm.phantom import KINDS, LOCATIONS, Finding

FINDINGS = st.builds(
    Finding,
    kind=st.sampled_from(sorted(KINDS)),
    side=st.sampled_from(["", "left", "right", "both"]),
    location=st.sampled_from(["", "nowhere", *sorted(LOCATIONS)]),
    severity=st.floats(0, 1),
    texture=st.sampled_from(["", "streaky", "patchy", "round", "interstitial"]),
    count=st.integers(1, 6),
)
