"""A directory that behaves like the parts of sysfs and procfs that launch scripts read and write.

Files are ordinary files; a thread does what the kernel would do when they are written: devices leave and get
drivers, physical functions make virtual ones. It acts some milliseconds late, as udev does.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import TracebackType

#: Class codes as sysfs has them.
NETWORK, BRIDGE = "0x020000", "0x060400"


class PretendSysfs:
    """The tree below `root`; a context manager, since it has a thread.

    `log` is what was done to devices, in order: `ADDRESS bound DRIVER`, `ADDRESS unbound`, `ADDRESS vfs N`.
    """

    def __init__(
        self, root: Path, online: str = "0-1", isolated: str = "", free_hugepages: int = 4096
    ) -> None:
        self.root = root
        self.log: list[str] = []
        self._pci = root / "sys/bus/pci"
        self._own: dict[str, str] = {}
        #: Devices that no driver takes.
        self.stuck: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.write("sys/devices/system/cpu/online", online)
        self.write("sys/devices/system/cpu/isolated", isolated)
        for kib in (2048, 1048576):
            pages = f"sys/devices/system/node/node0/hugepages/hugepages-{kib}kB"
            self.write(f"{pages}/free_hugepages", str(free_hugepages))
            self.write(f"{pages}/nr_hugepages", str(free_hugepages + 8))
        self.write("sys/bus/pci/drivers_probe", "")
        (self._pci / "devices").mkdir()
        self.driver("vfio-pci")

    def __enter__(self) -> PretendSysfs:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def write(self, name: str, text: str) -> None:
        """A file, with the newline that sysfs ends values with; none in one that takes commands."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if text or name.endswith("isolated") else "")

    def read(self, name: str) -> str:
        """A file without its newline."""
        return (self.root / name).read_text().strip()

    def driver(self, name: str) -> None:
        """A driver without devices."""
        self.write(f"sys/bus/pci/drivers/{name}/unbind", "")

    def device(
        self, address: str, driver: str, group: int | None, kind: str = NETWORK, irqs: tuple[int, ...] = ()
    ) -> Path:
        """A PCI function, bound to its own driver (empty: none) and in an IOMMU group (None: in none)."""
        self._own[address] = driver
        real = self.root / "sys/devices/pci0000:00" / address
        self.write(f"sys/devices/pci0000:00/{address}/class", kind)
        self.write(f"sys/devices/pci0000:00/{address}/driver_override", "(null)")
        (self._pci / "devices" / address).symlink_to(real)
        if group is not None:
            members = self.root / f"sys/kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(real)
            (real / "iommu_group").symlink_to(members.parent)
        for irq in irqs:
            self.interrupt(address, irq, "0-1")
        if driver:
            if not (self._pci / "drivers" / driver).exists():
                self.driver(driver)
            self._bind(address, driver)
        return real

    def interrupt(self, address: str, irq: int, cpus: str) -> None:
        """A message-signalled interrupt that a device has, and where it goes."""
        self.write(f"proc/irq/{irq}/smp_affinity_list", cpus)
        self.write(f"sys/devices/pci0000:00/{address}/msi_irqs/{irq}", "msix")

    def physical(self, address: str, driver: str, group: int, net: str, total: int, vfs: int = 0) -> Path:
        """A physical function with a network interface that is down."""
        real = self.device(address, driver, group)
        for name, text in {
            "sriov_totalvfs": str(total),
            "sriov_numvfs": str(vfs),
            f"net/{net}/flags": "0x1002",
        }.items():
            self.write(f"sys/devices/pci0000:00/{address}/{name}", text)
        self._made(real, vfs)
        return real

    def bound(self, address: str) -> str:
        """The driver that a device is bound to, or nothing."""
        link = self._pci / "devices" / address / "driver"
        return link.resolve().name if link.is_symlink() else ""

    def override(self, address: str) -> str:
        """The driver that only is allowed for a device; `(null)` for none."""
        return self.read(f"sys/devices/pci0000:00/{address}/driver_override")

    # What the kernel does ---------------------------------------------------------------------------

    def _bind(self, address: str, driver: str) -> None:
        (self._pci / "devices" / address).resolve().joinpath("driver").symlink_to(
            self._pci / "drivers" / driver
        )
        self.log.append(f"{address} bound {driver}")

    def _made(self, real: Path, count: int) -> None:
        """Virtual functions come after the physical one: 0000:01:00.0 has 0000:01:10.0, .1, ..."""
        vfs = sorted(real.glob("virtfn*"))
        if count == len(vfs):
            return
        for vf in vfs:
            address = vf.resolve().name
            (vf.resolve() / "iommu_group" / "devices" / address).unlink()
            shutil.rmtree(vf.resolve())
            (self._pci / "devices" / address).unlink()
            vf.unlink()
        for number in range(count):
            address = f"{real.name[:8]}10.{number}"
            vf_real = self.device(address, "igbvf", 100 + number)
            (real / f"virtfn{number}").symlink_to(vf_real)
        self.log.append(f"{real.name} vfs {count}")

    def _take(self, path: Path) -> str:
        """What was written to a file that takes commands."""
        text = path.read_text()
        if not text.endswith("\n"):
            return ""
        path.write_text("")
        return text.strip()

    def _run(self) -> None:
        while not self._stop.is_set():
            for unbind in self._pci.glob("drivers/*/unbind"):
                address = self._take(unbind)
                if address and self.bound(address) == unbind.parent.name:
                    (self._pci / "devices" / address).resolve().joinpath("driver").unlink()
                    self.log.append(f"{address} unbound")
            for real in (self.root / "sys/devices/pci0000:00").glob("*"):
                override = real / "driver_override"
                if override.exists() and override.read_text() == "\n":
                    override.write_text("(null)\n")
            address = self._take(self._pci / "drivers_probe")
            if address and not self.bound(address) and address not in self.stuck:
                override_now = self.override(address)
                driver = self._own[address] if override_now in ("", "(null)") else override_now
                if driver:
                    self._bind(address, driver)
            for count in self.root.glob("sys/devices/pci0000:00/*/sriov_numvfs"):
                text = count.read_text()
                if text.endswith("\n"):
                    self._made(count.parent, int(text))
            time.sleep(0.003)
