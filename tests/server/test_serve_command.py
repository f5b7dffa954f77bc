"""The command `dalle serve`, as a process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI
from servers.images import wait_until

from dalle.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key-file or DALLE_API_KEY, or say --no-auth"),
        (["--host", "192.0.2.1", "--no-auth"], "cannot listen on 192.0.2.1"),
        (["--bundle", "nowhere"], "no bundle at nowhere"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--results", "many"], "the memory 'many'"),
        (["--best-of", "600"], "above --max-candidates"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--grace", "inf"], "--grace is inf"),
        (["--port", "99999"], "--port is 99999; expected 1 to 65535"),
        (["--host", "no such host", "--no-auth"], "there is no address 'no such host'"),
        (["--allowed-host", "https://draw.example.org"], "expected a name alone, such as draw.example.org"),
        (["--cors-origin", "*"], "each page is allowed by name"),
        (["--cors-origin", "https://chat.example.org/"], "without a slash at the end"),
        (["--cors-origin", "chat.example.org"], "expected scheme and host"),
        (["--public-url", "draw.example.org"], "expected one such as https://draw.example.org"),
        (["--results", "1KB"], "the pictures of one request may take 40MB"),
    ],
)
def test_what_cannot_be_served_is_one_line(bundle, capsys, monkeypatch, arguments, words):
    monkeypatch.delenv("DALLE_API_KEY", raising=False)
    given = arguments if "--bundle" in arguments else ["--bundle", str(bundle), *arguments]
    assert main(["serve", *given]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert words in error[0]


def test_a_key_that_clients_cannot_send_and_a_port_in_use_are_told(bundle, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "--bundle", str(bundle), "--port", str(other.getsockname()[1])]) == 1
    assert re.search(r"port \d+ \(Address already in use\): give another --port", capsys.readouterr().err)
    monkeypatch.setenv("DALLE_API_KEY", "schlüssel")
    assert main(["serve", "--bundle", str(bundle)]) == 1
    assert "DALLE_API_KEY is not in ASCII" in capsys.readouterr().err


@pytest.mark.slow
def test_without_the_extra_it_says_what_to_install(bundle):
    without = "import sys; sys.modules['starlette'] = None; from dalle.cli.main import main"
    program = f"{without}; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", "--bundle", str(bundle)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: starlette\S* is not installed: run `pip install 'dalle\[serve\]'`\n", ended.stderr)


def test_the_extra_adds_four_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {re.split(r"[>=]", line)[0] for line in project["optional-dependencies"]["serve"]}
    assert extra == {"starlette", "uvicorn", "python-multipart", "prometheus-client"}
    # what these need is there already, through other packages
    needed = {
        re.split(r"[\s<>=!~\[;(]", line)[0].lower()
        for name in extra
        for line in requires(name) or []
        if "extra ==" not in line
    }
    assert needed <= {"anyio", "click", "h11", "typing-extensions"}


@contextmanager
def served(bundle, *arguments):
    """A server as a process; yields it and its address."""
    command = [sys.executable, "-m", "dalle", "serve", "--bundle", str(bundle), "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
        reader.start()
        wait_until(lambda: lines or process.poll() is not None)
        yield process, re.search(r"http://[\d.]+:\d+", lines[0])[0], lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def is_ready(url):
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way_and_exits_with_zero(bundle):
    with served(bundle, "--best-of", "256") as (process, url, lines):
        wait_until(lambda: is_ready(url))
        client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        stream = client.images.generate(prompt="a red cube", stream=True, partial_images=3)
        events = iter(stream)
        assert next(events).type == "image_generation.partial_image"
        process.send_signal(signal.SIGTERM)
        assert [event.type for event in events][-1] == "image_generation.completed"
        assert process.wait(60) == 0
    assert any("SIGTERM: finishing" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_a_bundle_that_cannot_be_loaded_ends_it_in_one_line(bundle_copy):
    (bundle_copy / "dalle" / "model.safetensors").write_bytes(b"damaged")
    with served(bundle_copy) as (process, _, lines):
        assert process.wait(60) == 1
        wait_until(lambda: any(line.startswith("error: ") for line in lines))
    assert not any("Traceback" in line for line in lines)
