"""Heterogeneous sharding (Hecate, algorithm 2): at which device each expert is at home. Host side, numpy.

The experts of all layers live in one store of R = L E rows, cut into D equal blocks: so every device always holds
the same number of bytes, while of a single layer it may own few experts or many. rows int32[L, E] says in which
row an expert is. It is data: moving an expert changes numbers in it and rows of the store, and no shape.
"""

import numpy as np

from research.moe.placement.plan import Topology


def even_rows(layers: int, num_experts: int) -> np.ndarray:
    """rows int32[L, E] of plain expert parallelism: expert e of layer l is in row e L + l, so that for any D that
    divides E every device owns E / D experts of each layer."""
    return (np.arange(num_experts)[None] * layers + np.arange(layers)[:, None]).astype(np.int32)


def homes(rows: np.ndarray, devices: int) -> np.ndarray:
    """int[L, E]: the device whose block each expert's row is in."""
    return rows // (rows.size // devices)


def owned(rows: np.ndarray, devices: int) -> np.ndarray:
    """int[L, D]: how many experts of each layer each device owns."""
    home = homes(rows, devices)
    return np.stack([np.bincount(layer, minlength=devices) for layer in home])


def plan_shards(loads: np.ndarray, topology: Topology, *, reach: int, most: int) -> np.ndarray:
    """Homes int[L, E] by the expected loads [L, E].

    Of each layer the `reach` hottest experts are set aside: they are copied anyway. The rest is placed first,
    layers in falling order of the largest load among their rest, in a layer hottest first: each goes to the node
    that has least load of this layer, and in it to the least loaded device (ties: fewer free slots, then the lower
    number). Then the hottest fill what is left, those of a layer on as many devices as possible, so that no home
    has many to send. Every device ends with L E / D experts, and with at most `most` of one layer.
    """
    layers, count = loads.shape
    devices = topology.devices
    assert most * devices >= count and (layers * count) % devices == 0
    order = np.argsort(-loads, axis=1, kind="stable")
    reach = min(reach, count)
    room = _Room(layers, count, devices, most)
    home = np.full((layers, count), -1)
    peak = [loads[layer, order[layer, reach]] if reach < count else -1.0 for layer in range(layers)]
    for layer in sorted(range(layers), key=lambda layer: (-peak[layer], layer)):
        load = np.zeros(devices)
        for expert in order[layer, reach:]:
            node_load = np.bincount(topology.node_of, load)[topology.node_of]
            keys = zip(node_load, load, room.free(), range(devices), strict=True)
            for *_, device in sorted(keys):
                if room.take(layer, device):
                    break
            load[device] += loads[layer, expert]
            home[layer, expert] = device
    for layer in range(layers):
        hot = np.zeros(devices, int)
        for expert in order[layer, :reach]:
            keys = zip(hot, -room.free(), range(devices), strict=True)
            for *_, device in sorted(keys):
                if room.take(layer, device):
                    break
            hot[device] += 1
            home[layer, expert] = device
    return home


class _Room:
    """Keeps a greedy placement completable: a device is full, and may take no more than `most` of a layer.

    `final` [L, D] is always some complete placement with the right sums that goes on from what is `taken`; taking
    a place outside it is allowed if `final` can be changed to contain it, which a path through what is not yet
    taken shows.
    """

    def __init__(self, layers: int, count: int, devices: int, most: int):
        self.most, self.slots = most, layers * count // devices
        self.taken = np.zeros((layers, devices), int)
        # Layer after layer around the devices: all sums are right, and no cell has more than ceil(E / D).
        spread = np.arange(layers * count) % devices
        self.final = np.stack([np.bincount(s, minlength=devices) for s in spread.reshape(layers, count)])

    def free(self) -> np.ndarray:
        """int[D]: slots of each device that nothing has taken."""
        return self.slots - self.taken.sum(axis=0)

    def take(self, layer: int, device: int) -> bool:
        """Takes a place for an expert of `layer` on `device`; False if the rest could then not be placed."""
        if self.taken[layer, device] == self.final[layer, device] and not self._make_place(layer, device):
            return False
        self.taken[layer, device] += 1
        return True

    def _make_place(self, layer: int, device: int) -> bool:
        """Changes `final` to have one more of `layer` on `device`.

        Breadth first: `device` then has one too many, of another layer that has one to spare there; that one
        goes to another device, and so on until a device gives away one of `layer`.
        """
        if self.final[layer, device] >= self.most:
            return False
        spare = self.final - self.taken
        came: dict[int, tuple[int, int]] = {
            device: (-1, -1)
        }  # device -> (layer that left for it, from where)
        queue = [device]
        while queue:
            at = queue.pop(0)
            if at != device and spare[layer, at] > 0:
                self._shift(layer, device, at, came)
                return True
            for other in np.flatnonzero(spare[:, at] > 0):
                if other == layer:
                    continue
                for to in np.flatnonzero(self.final[other] < self.most):
                    if int(to) not in came:
                        came[int(to)] = (int(other), at)
                        queue.append(int(to))
        return False

    def _shift(self, layer: int, device: int, at: int, came: dict[int, tuple[int, int]]) -> None:
        self.final[layer, device] += 1
        self.final[layer, at] -= 1
        while at != device:
            other, before = came[at]
            self.final[other, before] -= 1
            self.final[other, at] += 1
            at = before


def assign_rows(rows: np.ndarray, home: np.ndarray, devices: int) -> np.ndarray:
    """New rows int32[L, E] in the blocks of their `home` [L, E]; an expert that stays at home keeps its row."""
    block = rows.size // devices
    stays = homes(rows, devices) == home
    taken = np.zeros(rows.size, bool)
    taken[rows[stays]] = True
    new = np.where(stays, rows, -1)
    for device in range(devices):
        free = device * block + np.flatnonzero(~taken[device * block : (device + 1) * block])
        # Expert after expert, the layers in turn: a block may later be cut for more devices.
        comes = np.argwhere((~stays & (home == device)).T)[:, ::-1]
        new[comes[:, 0], comes[:, 1]] = free
    return new.astype(np.int32)


def sources(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """int32[R]: for every row of the store under rows `new`, the row its content has under rows `old`."""
    result = np.empty(old.size, np.int32)
    result[new.reshape(-1)] = old.reshape(-1)
    return result
