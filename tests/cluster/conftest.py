"""A local Ray for the tests that need one in this process."""

import pytest


@pytest.fixture(scope="package")
def ray_session():
    import logging

    import ray
    import ray.data

    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=2**28
    )
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    yield
    ray.shutdown()
