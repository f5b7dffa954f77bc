"""The official JavaScript client, where node and the package are: `make js-client` installs it."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = HERE.parents[1] / ".venv" / "js" / "node_modules"


def test_the_official_javascript_client_draws_unchanged(server, tmp_path):
    node = shutil.which("node")
    if node is None or not (MODULES / "openai").is_dir():
        pytest.skip("node or the package openai for it is missing: `make js-client`")
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(HERE / "js_client.mjs", tmp_path)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [node, str(tmp_path / "js_client.mjs"), f"{server.url}/v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    pictures = [base64.b64decode(item["b64_json"]) for item in found["plain"]["data"]]
    answer = server.client().images.generate(prompt="a red cube on a blue cube", n=2, extra_body={"seed": 3})
    assert pictures == [base64.b64decode(item.b64_json) for item in answer.data]
    assert found["plain"]["data"] == found["again"]["data"]
    assert found["plain"]["data"][0]["dalle"]["seed"] == 3
    assert found["events"] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert (found["refused"]["name"], found["refused"]["param"]) == ("BadRequestError", "sead")
    assert "did you mean seed?" in found["refused"]["message"]
    assert found["refused"]["id"].startswith("req_")
    assert found["models"] == ["tiny", "dall-e-2"]
