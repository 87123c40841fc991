"""A pytest plugin: a line of JSON for each test as it ends, into the file JAXWARP_EACH_TEST.

So a run that is ended early has told what was tested. `pytest -p each_test`.
"""

import json
import os
from pathlib import Path

import pytest

PATH = os.environ.get("JAXWARP_EACH_TEST")


def pytest_configure(config):
    # xdist's workers report to the controller, which calls the hooks below too.
    if PATH and not hasattr(config, "workerinput"):
        config.pluginmanager.register(EachTest(Path(PATH)))


class EachTest:
    def __init__(self, path):
        self.path = path

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # the others run in another session
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:  # also a setup that skips or fails
            self.tell(report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.tell(report)

    def tell(self, report):
        entry = {"test": report.nodeid, "outcome": report.outcome, "why": why(report)}
        entry["seconds"] = round(getattr(report, "duration", 0.0), 2)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def why(report):
    if report.skipped and isinstance(report.longrepr, (tuple, list)):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "" if report.passed else report.longreprtext[-3000:]
