"""An accelerator on a board, over its serial link."""

import numpy as np

from moeware.hw.arch.config import Config
from moeware.hw.arch.program import DeviceStep, Program

from .device import DeviceError, Progress, check_digest
from .drive import Driver, Target
from .serial_link import LinkError, SerialLink, find_ports

__all__ = ["BoardDevice", "open_board"]


class BoardDevice:
    """A device (see `device.Device`) behind a link.

    link : registers and memory of the board; config : what the programs to run are compiled for, or
    None to have it checked with each program; timeout_s : longest time for one frame.

    Raises
    ------
    DeviceError
        No accelerator answers, or one of another configuration.
    LinkError
        The link fails; it is a `DeviceLost`.
    """

    def __init__(self, link: Target, config: Config | None = None, *, name: str = "board",
                 timeout_s: float = 10.0):
        self.name = name
        self.config = config
        self.counters: list[dict[str, int]] = []
        self._driver = Driver(link, name=name, timeout_s=timeout_s)
        self.digest = self._driver.digest
        if config is not None:
            check_digest(name, self.digest, None, config)

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        self.counters = []
        result, self.counters = self._driver.run(
            program, step, inputs, probes=probes, progress=progress)
        return result


def open_board(config: Config | None, *, port: str | None = None,
               timeout_s: float = 10.0) -> BoardDevice:
    """The accelerator on serial port `port`, or on the first port where one of `config` answers.

    Raises
    ------
    DeviceError
        There is none; the message says what was found on each port.
    """
    ports = [port] if port is not None else find_ports()
    if not ports:
        raise DeviceError("no board found")
    problems = []
    for each in ports:
        try:
            link = SerialLink(each)
        except LinkError as error:
            problems.append(str(error))
            continue
        try:
            return BoardDevice(link, config, name=f"board on {each}", timeout_s=timeout_s)
        except DeviceError as error:
            problems.append(str(error))
            link.close()
    raise DeviceError("no board found: " + "; ".join(problems))
