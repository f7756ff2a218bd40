"""A test a race of ``wireframe bench kernels``."""

from wireframe.bench import runner


def pytest_generate_tests(metafunc):
    runner.parametrize(metafunc, "kernels")


def test_kernels(race, benchmark, pytestconfig):
    runner.suite_of(pytestconfig).run("kernels", race, benchmark)
