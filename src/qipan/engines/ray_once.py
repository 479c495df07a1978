"""Run one command in a Ray job and wait: `python -m qipan.engines.ray_once ADDRESS RESOURCE DEVICES COMMAND...`.
The environment is this process's."""

import os
import shlex
import sys
import time
import uuid

import httpx

POLL_S = 0.5


def main() -> int:
    address, resource, devices, *command = sys.argv[1:]
    name = f"qipan-probe-{uuid.uuid4().hex[:8]}"
    kept = [
        f"{key}={value}"
        for key, value in os.environ.items()
        if key.startswith(("QIPAN_", "OMP_", "GLOO_", "TORCH_", "PYTHONPATH"))
    ]
    job: dict[str, object] = {"entrypoint": shlex.join(["env", *kept, *command]), "submission_id": name}
    if resource in ("CPU", "GPU"):
        job[f"entrypoint_num_{resource.lower()}s"] = int(devices)
    else:
        job |= {"entrypoint_num_cpus": 0, "entrypoint_resources": {resource: int(devices)}}
    with httpx.Client(base_url=address, timeout=30) as client:
        client.post("/api/jobs/", json=job).raise_for_status()
        while True:
            found = client.get(f"/api/jobs/{name}").raise_for_status().json()
            if found["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
                print(client.get(f"/api/jobs/{name}/logs").json().get("logs", ""))
                return 0 if found["status"] == "SUCCEEDED" else 1
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
