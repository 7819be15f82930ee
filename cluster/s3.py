"""S3 objects that are read once and in full, with the keys and endpoint that every AWS client finds."""

from typing import Any
from urllib.parse import urlparse

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.errors import UserError

REMEDY = "check the bucket, the AWS_* variables and AWS_ENDPOINT_URL"


def client() -> Any:
    """One that gives up within seconds."""
    return boto3.client("s3", config=Config(connect_timeout=5, retries={"max_attempts": 1}))


def bucket_and_key(url: str) -> tuple[str, str]:
    return urlparse(url).netloc, urlparse(url, allow_fragments=False).path.lstrip("/")


def read_text(url: str, field: str) -> str:
    """The text of an object; UserError, naming `field`, if it cannot be read."""
    bucket, key = bucket_and_key(url)
    try:
        return client().get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    except (BotoCoreError, ClientError, UnicodeDecodeError) as error:
        raise UserError(field, f"{url!r} cannot be read ({error}): {REMEDY}") from error
