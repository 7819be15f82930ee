"""A bucket that a recipe names, looked at before anything is spent."""

import uuid
from urllib.parse import urlparse

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from cluster.errors import UserError
from cluster.store import IMPATIENT, Exists, S3Store

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of the server of AWS_ENDPOINT_URL"
PROBES = "probe/"


def check(field: str, url: str) -> None:
    """UserError, in seconds, unless the bucket is there, can be written, and lets a name be taken only once."""
    store = S3Store(url, IMPATIENT)
    try:
        store.client.head_bucket(Bucket=store.bucket)
        _probe(field, store)
    except (ConnectionError, HTTPClientError) as error:
        why = f"{_server(store)} is not reachable ({type(error).__name__}): start it, or mend AWS_ENDPOINT_URL"
        raise UserError(field, why) from None
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code in ("404", "NoSuchBucket"):
            raise UserError(field, f"there is no bucket {store.bucket}: create it, or name another") from None
        if status >= 500:
            raise UserError(field, f"{_server(store)} answers {status} ({code}): try again when it is well") from None
        raise UserError(field, f"{store.url} cannot be written ({code}): {CREDENTIALS}") from None
    except (BotoCoreError, ValueError) as error:  # no or half credentials, no sound endpoint
        raise UserError(field, f"{store.url} cannot be used ({type(error).__name__}): {CREDENTIALS}") from None


def _server(store: S3Store) -> str:
    """Its address, without the credentials that a URL can hold."""
    endpoint = urlparse(store.client.meta.endpoint_url)
    return f"{endpoint.hostname}:{endpoint.port}" if endpoint.port else str(endpoint.hostname)


def _probe(field: str, store: S3Store) -> None:
    name = f"{PROBES}{uuid.uuid4().hex}"
    store.put_new(name, b"first")
    try:
        store.put_new(name, b"second")
    except Exists:
        return
    finally:
        store.delete([name])
    raise UserError(
        field,
        f"the server of {store.url} ignores conditional puts (If-None-Match), so that two sweeps could take one "
        "prefix: use one that has them, such as AWS S3, SeaweedFS or MinIO",
    )
