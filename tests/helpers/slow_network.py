"""Hosts of their own on one machine, and a network between them that is slow.

Each host is a process in namespaces of its own, whose only way to the others is
a TUN device: an interface whose packets a program reads and writes. `Network`
is that program. It hands each packet on after a delay, as `tc netem` would
where the kernel has it. Linux, as root.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import pathlib
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_SUBNET = '10.77.0'


def missing() -> str | None:
  """Why there can be no such network here, if there cannot."""
  for program in ('unshare', 'ip', 'mount'):
    if not shutil.which(program):
      return f'no program {program}'
  if os.geteuid():
    return 'needs root'
  probe = ['unshare', '--net', '--uts', '--mount', 'true']
  if subprocess.run(probe, capture_output=True).returncode:
    return 'no namespaces'
  return None if os.access('/dev/net/tun', os.W_OK) else 'no /dev/net/tun'


def address(i: int) -> str:
  """Of host i."""
  return f'{_SUBNET}.{i + 1}'


class Network:
  """Hands packets from host to host, each after `delay` seconds.

  Args:
    folder: for a socket and the hosts' files.
    hosts: how many there are.
    delay: of each packet on its way, in seconds.

  Attributes:
    packets: how many were handed on.
  """

  def __init__(self, folder: pathlib.Path, hosts: int, delay: float):
    self.packets = 0
    self._folder, self._n, self._delay = folder, hosts, delay
    names = [f'{address(i)} host{i}\n' for i in range(hosts)]
    (folder / 'hosts').write_text('127.0.0.1 localhost\n' + ''.join(names))
    self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    self._server.bind(str(folder / 'tun'))
    self._server.listen(hosts)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def command(self, i: int, argv: list[str]) -> list[str]:
    """The command line that runs `argv` on host i."""
    apart = ['unshare', '--net', '--uts', '--mount', '--']
    own = [sys.executable, __file__, str(self._folder), str(i)]
    return [*apart, *own, *argv]

  def join(self, i: int, tun: int) -> None:
    """Takes the device of host i, and closes it here."""
    _send(self._folder, i, tun)
    os.close(tun)

  def close(self) -> None:
    """Cuts all connections."""
    self._stop.set()
    self._thread.join()
    self._server.close()

  def _run(self):
    tuns: dict[int, int] = {}
    order, waiting = itertools.count(), []
    while not self._stop.is_set():
      wait = max(waiting[0][0] - time.monotonic(), 0) if waiting else 0.1
      ready, _, _ = select.select(
        [self._server, *tuns.values()], [], [], min(wait, 0.1)
      )
      for fd in ready:
        if fd is self._server:
          connection, _ = self._server.accept()
          name, (tun,), _, _ = socket.recv_fds(connection, 16, 1)
          tuns[int(name)] = tun
          connection.close()
          continue
        try:
          packet = os.read(fd, 65536)
        except OSError:  # the host is gone, and its interface with it
          os.close(fd)
          tuns = {i: tun for i, tun in tuns.items() if tun != fd}
          continue
        if packet and packet[0] >> 4 == 4:
          due = time.monotonic() + self._delay
          heapq.heappush(waiting, (due, next(order), packet))
      while waiting and waiting[0][0] <= time.monotonic():
        packet = heapq.heappop(waiting)[-1]
        tun = tuns.get(packet[19] - 1)  # the last byte of its destination
        if tun is not None:
          with contextlib.suppress(OSError):  # as above
            os.write(tun, packet)
            self.packets += 1
    for tun in tuns.values():
      os.close(tun)


def _send(folder, i: int, tun: int) -> None:
  with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
    s.connect(os.path.join(folder, 'tun'))
    socket.send_fds(s, [str(i).encode()], [tun])


def _enter(folder: str, i: int, argv: list[str]) -> None:
  """Makes this process host i, then runs `argv` in its place."""
  tun = os.open('/dev/net/tun', os.O_RDWR)
  name = struct.pack('16sH22x', b'tun0', _IFF_TUN_NO_PI)
  fcntl.ioctl(tun, _TUNSETIFF, name)
  for command in (
    f'ip addr add {address(i)}/24 dev tun0',
    'ip link set tun0 up',
    'ip link set lo up',
    f'mount --bind {folder}/hosts /etc/hosts',
  ):
    subprocess.run(command.split(), check=True)
  socket.sethostname(f'host{i}')
  _send(folder, i, tun)
  os.execvp(argv[0], argv)


if __name__ == '__main__':
  _enter(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
