from tests.support.threads import one_thread  # noqa: F401 - a fixture, by name
