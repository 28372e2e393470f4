"""A cluster of several raylets on this machine. Tests that use it need Ray: `make test-ray`."""

from __future__ import annotations

import os
import socket

import pytest
from tiny import make


@pytest.fixture(scope="session")
def store():
    """An object store with the bucket `bucket`."""
    from bucket import Store

    started = Store()
    started.make("bucket")
    os.environ.update(started.environment())  # before Ray's processes start, which inherit it
    yield started
    started.stop()


@pytest.fixture(scope="session")
def cluster(store):
    """A cluster of a head without processors, and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:  # another cluster may have the dashboard's usual port
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=1, memory=6 << 30)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def connected(cluster):
    """This process as a driver of the cluster; its workers stay, with what they have imported."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture
def source(tmp_path):
    """A checkpoint of many shards."""
    path = tmp_path / "float"
    make("llama").bfloat16().save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    assert len(list(path.glob("*.safetensors"))) > 8
    return path
