"""`make demo`: Debian's cloud kernel under `vmsup run --jail`, and what its device processes may do.

Runs in the testbed where the local /dev/kvm cannot boot a stock kernel.  The exit status is the VM's: 0 after
the guest has powered itself off.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from integration import kvm  # noqa: E402
from integration.boot import images, vm  # noqa: E402

LOOK_NOW = "demo: waiting for a line"
SCRIPT = f'{images.REPORT}\necho "{LOOK_NOW}"\nread -r line\npoweroff -f\n'


def main() -> int:
    try:
        kernel = images.kernel(images.CLOUD)
        if (why := kvm.no_linux()) is None:
            return boot(kernel)
    except images.TestbedError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    print(f"demo: no stock kernel boots on /dev/kvm ({why}): using the testbed", flush=True)
    os.execv(ROOT / "integration/testbed/run", ["run", "--timeout", "300", "--", sys.executable, __file__])


def boot(kernel: images.Kernel) -> int:
    with tempfile.TemporaryDirectory(prefix="vmsup-demo-") as directory:
        initrd, socket = Path(directory, "initrd"), Path(directory, "socket")
        initrd.write_bytes(images.initramfs(SCRIPT, kernel))
        machine = ["--jail", "--cpus", "2", "--mem", "256", "--socket", str(socket)]
        boot = ["--initrd", str(initrd), "--params", "quiet", str(kernel.bzimage)]
        print(f"$ vmsup run {shlex.join(machine + boot)}", flush=True)
        said = []
        devices = "the guest never came up"
        command = vm.command("run", *machine, *boot)
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
            assert run.stdin is not None
            assert run.stdout is not None
            for raw in run.stdout:
                line = raw.decode(errors="replace").rstrip()
                print(line, flush=True)
                said.append(line)
                if line == LOOK_NOW:
                    ps = vm.command("ps", str(socket))
                    devices = subprocess.check_output(ps, cwd=ROOT, text=True)
                    run.stdin.write(b"\n")
                    run.stdin.flush()
        guest = said[said.index(images.UP) + 1 :][:2] if images.UP in said else []
    print("\nThe guest:", *guest, f"\nIts devices, on {kvm.name()}:", devices, sep="\n")
    print(f"vmsup run ended with exit status {run.returncode}")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
