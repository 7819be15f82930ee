"""Three calls, to be copied to a shell, that work as they are printed."""

from serve.catalog import Entry


def lines(url: str, token: str | None, entries: list[Entry]) -> list[str]:
    """List, encode in JSON, rebuild raw bytes; of a dictionary that reads one site if there is one."""
    key = f" -H 'Authorization: Bearer {token}'" if token else ""
    calls = [f"curl -sS{key} '{url}/v1/dictionaries?limit=3'"]
    single = next((entry for entry in entries if len(entry.reads) == 1), None)
    if single is None:
        return calls
    dictionary = f"{url}/v1/dictionaries/{single.id}"
    rows = f"""python3 -c 'import json; print(json.dumps({{"rows": [[1.0] * {single.d_in}]}}))'"""
    json_type = "-H 'Content-Type: application/json'"
    bytes_type = f"-H 'Content-Type: application/octet-stream' -H 'X-Shape: 2,{single.d_in}'"
    zeros, wanted = f"head -c {2 * 4 * single.d_in} /dev/zero", "-H 'Accept: application/json'"
    return [
        *calls,
        f"{rows} | curl -sS{key} {json_type} --data-binary @- '{dictionary}/encode?top_k=5'",
        f"{zeros} | curl -sS{key} {bytes_type} {wanted} --data-binary @- '{dictionary}/reconstruct'",
    ]
