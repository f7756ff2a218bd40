"""A test a race of ``wireframe bench pipeline``."""

from wireframe.bench import runner


def pytest_generate_tests(metafunc):
    runner.parametrize(metafunc, "pipeline")


def test_pipeline(race, benchmark, pytestconfig):
    runner.suite_of(pytestconfig).run("pipeline", race, benchmark)
