"""Who runs what, when tests run in several processes (`pytest -n 2`); and no test has a clock."""
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


class ByFile(LoadFileScheduling):
    "A file's tests share what they made and so a process; each notebook is on its own, and fills what time is left."

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "::test_a_notebook_gives" in nodeid else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)  # xdist's own way (--dist loadgroup) does not see groups under pytest 9.2
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)
