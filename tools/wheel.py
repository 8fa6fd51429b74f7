"""Builds the wheel, looks into it, and installs it into empty environments: `python -m tools.wheel [--server]`.

Without `--server`: the SDK alone. It must bring no torch, its import and its command must work. With `--server`: the
server too, started as a user starts it; it must answer. Dependencies are really installed, at the exact versions of
constraints.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SDK_CHECK = """
import sys
import myserve, myserve.sdk, myserve.sdk.testing, myserve.errors
from importlib.util import find_spec
assert not any(find_spec(name) for name in ("torch", "transformers", "numba", "fastapi")), "more than the SDK needs"
assert "torch" not in sys.modules
sampler = myserve.sdk.DeploymentSampler("http://localhost:9", "m")
print(myserve.__version__)
"""


def run(*command: str | Path, **options: object) -> str:
    """Run a command and return what it printed; its output is shown where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def build(folder: Path) -> Path:
    """Build the wheel as pip does, in an environment of its own."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("myserve-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The package and the embedded model, and nothing that only made them."""
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"myserve"}, folders
    for needed in ("myserve/py.typed", "myserve/embedded/model/model.safetensors", "myserve/server/pages"):
        assert any(name.startswith(needed) for name in names), f"{needed} is missing"
    strays = [
        name
        for name in names
        if any(word in name for word in ("train.py", "lexicon", "tests/", "__pycache__"))
    ]
    assert not strays, strays
    assert any(name.endswith("licenses/LICENSE") for name in names)


def environment(folder: Path, what: str) -> Path:
    """Make an empty environment, install `what` into it, and return its folder of commands."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if "[server]" in what:  # pip's own order may take long to find torch's exact version
        run(*pip, "--constraint", ROOT / "constraints.txt", "torch")
    run(*pip, "--constraint", ROOT / "constraints.txt", what)
    return folder / "bin"


def clean() -> dict[str, str]:
    """The environment's variables without those that would show this checkout to the installed package."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def check_sdk(wheel: Path, folder: Path) -> None:
    """Install the SDK alone; it imports no torch, for there is none, and says what serving needs."""
    commands = environment(folder / "sdk", str(wheel))
    version = run(commands / "python", "-I", "-c", SDK_CHECK, cwd=folder, env=clean()).strip()
    assert run(commands / "myserve", "--version", cwd=folder, env=clean()).strip().endswith(version)
    refused = subprocess.run(
        [commands / "myserve", "serve"], capture_output=True, text=True, cwd=folder, env=clean()
    )
    assert refused.returncode and "myserve[server]" in refused.stderr, refused.stderr
    run(commands / "python", "-m", "pip", "check", env=clean())


def check_server(wheel: Path, folder: Path) -> None:
    """Install the server, start it as a user does, and ask it."""
    commands = environment(folder / "server", f"{wheel}[server]")
    log = (folder / "serve.log").open("w+")
    server = subprocess.Popen(
        [commands / "myserve", "serve", "--port", "0"], stdout=log, stderr=log, cwd=folder, env=clean()
    )
    try:
        url = _url_of(server, folder / "serve.log")
        answer = run(commands / "myserve", "chat", "Solve: 2+2=", "--url", url, cwd=folder, env=clean())
        assert answer.strip().startswith("4"), answer
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0, (folder / "serve.log").read_text()


def _url_of(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the log has the server's address and it is healthy."""
    until = time.monotonic() + 300  # the first start compiles kernels
    while time.monotonic() < until and server.poll() is None:
        words = log.read_text().split()
        url = next((word for word in words if word.startswith("http://")), None)
        if url and not subprocess.run(["curl", "-sf", f"{url}/health"], capture_output=True).returncode:
            return url
        time.sleep(0.3)
    sys.exit(f"the server did not become healthy\n{log.read_text()}")


def main() -> None:
    """Build, look, install, run."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        wheel = build(folder)
        check_contents(wheel)
        check_sdk(wheel, folder)
        size = wheel.stat().st_size / 2**20
        print(f"{wheel.name}, {size:.1f} MiB: the SDK alone works ({time.monotonic() - began:.0f} s)")
        if "--server" in sys.argv[1:]:
            check_server(wheel, folder)
            print(f"with [server], `myserve serve` answers ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
