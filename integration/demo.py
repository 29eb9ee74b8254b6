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
from integration.boot import images  # noqa: E402

VMSUP = Path(sys.executable).with_name("vmsup")
LOOK_NOW = "demo: waiting for a line"
SCRIPT = f'{images.REPORT}\necho "{LOOK_NOW}"\nread -r line\npoweroff -f\n'


def main() -> int:
    try:
        kernel = images.kernel(images.CLOUD)
        if kvm.boots_linux():
            return boot(kernel)
    except images.TestbedError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    print("demo: the local /dev/kvm cannot boot a stock kernel: using the testbed", flush=True)
    os.execv(ROOT / "integration/testbed/run", ["run", "--timeout", "300", "--", sys.executable, __file__])


def boot(kernel: images.Kernel) -> int:
    with tempfile.TemporaryDirectory(prefix="vmsup-demo-") as directory:
        initrd, socket = Path(directory, "initrd"), Path(directory, "socket")
        initrd.write_bytes(images.initramfs(SCRIPT, kernel))
        machine = ["--jail", "--cpus", "2", "--mem", "256", "--socket", str(socket)]
        boot = ["--initrd", str(initrd), "--params", "quiet", str(kernel.bzimage)]
        command = [str(VMSUP), "run", *machine, *boot]
        print(f"$ {shlex.join(command)}", flush=True)
        said = []
        devices = "the guest never came up"
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vm:
            assert vm.stdin is not None
            assert vm.stdout is not None
            for raw in vm.stdout:
                line = raw.decode(errors="replace").rstrip()
                print(line, flush=True)
                said.append(line)
                if line == LOOK_NOW:
                    ps = subprocess.run([VMSUP, "ps", socket], text=True, stdout=subprocess.PIPE, check=True)
                    devices = ps.stdout
                    vm.stdin.write(b"\n")
                    vm.stdin.flush()
        guest = said[said.index(images.UP) + 1 :][:2] if images.UP in said else []
    print("\nThe guest:", *guest, f"\nIts devices, on {kvm.name()}:", devices, sep="\n")
    print(f"vmsup run ended with exit status {vm.returncode}")
    return vm.returncode


if __name__ == "__main__":
    sys.exit(main())
