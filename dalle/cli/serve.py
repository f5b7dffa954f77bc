"""`dalle serve`: a server of OpenAI's Images API, and a web page."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.computing import n_bytes
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Device, Flag
from dalle.data.bundle import PARTS, Precision, bundle_part, usable_device
from dalle.pipeline import Pipeline
from dalle.unclip.pipeline import UnCLIP

KEY_VARIABLE = "DALLE_API_KEY"
PICTURE_BYTES = 4_000_000
"""Of a picture of the largest size that may be asked for."""
_SCHEME = "https?://"


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Who may use the server."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs keys."""
    port: int = 8000
    """0 for any that is free."""
    api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Keys, one a line, each with a name before it if you like. DALLE_API_KEY in the environment is another one."""
    no_auth: Flag = False
    """Let anybody who reaches the address draw."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Further names of this server, such as draw.example.org behind a proxy."""
    cors_origin: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URL ...", help_behavior_hint="")] = ()
    """Web pages of others that may use it, such as https://chat.example.org."""
    public_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Where links to pictures lead, if not to where requests are sent."""

    def keys(self) -> dict[str, str]:
        """Return key -> name.

        Raises:
            ValueError: the file holds no keys.
            OSError: it cannot be read.
        """
        from dalle.server.security import read_keys

        keys = {} if self.api_key_file is None else read_keys(self.api_key_file)
        of_environment = os.environ.get(KEY_VARIABLE, "").strip()
        if not of_environment.isascii():
            raise ValueError(f"{KEY_VARIABLE} is not in ASCII, and clients could not send it: give another key")
        return {**keys, of_environment: KEY_VARIABLE} if of_environment else keys

    def check(self) -> None:
        """Raise ValueError for a port, or a name, that no request could match."""
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; expected 1 to 65535, or 0 for any that is free")
        for name in self.allowed_host:
            if not re.fullmatch(r"[^\s/:*@]+|[0-9a-fA-F:]+", name):
                raise ValueError(f"--allowed-host is {name!r}; expected a name alone, such as draw.example.org")
        for origin in self.cors_origin:
            if not re.fullmatch(rf"{_SCHEME}[^\s/*@]+", origin):
                raise ValueError(
                    f"--cors-origin is {origin!r}; expected scheme and host, such as https://chat.example.org, "
                    "without a slash at the end; each page is allowed by name"
                )
        if self.public_url is not None and not re.fullmatch(rf"{_SCHEME}\S+", self.public_url):
            raise ValueError(f"--public-url is {self.public_url!r}; expected one such as https://draw.example.org")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much may be asked for."""

    best_of: int = 16
    """Candidates of each request, unless it says best_of or quality."""
    max_candidates: int = 512
    """Candidates of one request at most."""
    max_n: int = 10
    """Pictures of one request at most."""
    queue: int = 32
    """Requests that wait at most."""
    timeout: float = 600.0
    """Seconds for a request."""
    grace: float = 30.0
    """Seconds to finish in when told to end."""
    results: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "256MB"
    """Memory for pictures that are answered as links, for an hour."""
    memory: Annotated[
        str | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: 2GiB; on a GPU half of what is free)")
    ] = None
    """Memory that a batch may take."""

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        for name in ("best_of", "max_candidates", "max_n", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.best_of > self.max_candidates:
            raise ValueError(f"--best-of is {self.best_of}, above --max-candidates, {self.max_candidates}")
        if not 0 < self.timeout < 1e9:
            raise ValueError(f"--timeout is {self.timeout:g}; give seconds, above 0")
        if not 0 <= self.grace < 1e9:
            raise ValueError(f"--grace is {self.grace:g}; give seconds, at least 0")
        needed = PICTURE_BYTES * self.max_n
        if n_bytes(self.results) < needed:
            raise ValueError(
                f"--results is {self.results}, but the pictures of one request may take {needed // 10**6}MB: "
                "give at least so much, or a smaller --max-n"
            )


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve OpenAI's Images API, and a web page, from a bundle; edits and variations by DALL·E 2 if it is there."""

    bundle: Bundle = DEFAULT_BUNDLE
    model_alias: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Further names of the model, such as gpt-image-1 or dall-e-2, which some programs send whatever they are told."""
    network: tyro.conf.OmitArgPrefixes[NetworkOptions] = NetworkOptions()
    limits: tyro.conf.OmitArgPrefixes[LimitOptions] = LimitOptions()
    device: Device = "auto"
    precision: Precision = "fp32"
    """bf16 is faster; in fp32 candidates do not depend on the batch size."""
    compile: Flag = False
    """Compile DALL·E's sampling and decoding on a CPU: takes a minute for each new number of candidates."""
    log_prompts: Flag = False
    """Write captions to the log."""

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C."""
        try:
            from dalle.server.api.requests import names_of_both
            from dalle.server.security import Rules
            from dalle.server.serving import Process, check_safe, run
            from dalle.server.state import Settings
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: run `pip install 'dalle[serve]'`") from error
        network, limits = self.network, self.limits
        network.check()
        limits.check()
        for part in PARTS:  # before anything listens
            bundle_part(self.bundle, part)
        device = usable_device(self.device)
        memory = None if limits.memory is None else n_bytes(limits.memory)
        rules = Rules(
            host=network.host,
            allowed_hosts=network.allowed_host,
            origins=network.cors_origin,
            keys=network.keys(),
        )
        check_safe(rules, no_auth=network.no_auth)
        name, has_unclip = self.bundle.resolve().name, (self.bundle / "decoder").exists()
        settings = Settings(
            models=(name, *self.model_alias, *(names_of_both(name) if has_unclip else ())),
            created=int(self.bundle.stat().st_mtime),
            best_of=limits.best_of,
            max_n=limits.max_n,
            max_candidates=limits.max_candidates,
            timeout_s=limits.timeout,
            public_url=network.public_url,
            log_prompts=self.log_prompts,
            result_bytes=n_bytes(limits.results),
        )
        process = Process(port=network.port, max_jobs=limits.queue, grace_s=limits.grace)
        load = lambda: Pipeline.load(  # noqa: E731
            self.bundle, device, precision=self.precision, memory=memory, compile=self.compile
        )

        def load_unclip() -> UnCLIP:
            try:
                return UnCLIP.load(self.bundle, device, precision=self.precision, memory=memory)
            except ValueError as error:
                away = f"or move {self.bundle / 'decoder'} away, so that DALL·E alone is served"
                raise ValueError(f"{error}; {away}") from error

        run(load, settings, rules, process, load_unclip if has_unclip else None)
