"""What the processes of a training tell each other, through torch.distributed.

Tensors travel on the device they are on; whatever is not a gradient goes
through the main memory. All processes of a group must call each function of
this file in the same order.
"""

import datetime
import os

import torch
import torch.distributed as dist

# Gradients are added up in pieces of so many numbers.
BUCKET_SIZE = 1 << 23


def start(timeout):
    """Joins the processes that `torchrun` started; nothing to do in one.

    Args:
        timeout: float. Seconds after which a process that waits for another
            gives up with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or is_started():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=datetime.timedelta(seconds=timeout),
    )


def is_started():
    return dist.is_available() and dist.is_initialized()


def num_processes():
    return dist.get_world_size() if is_started() else 1


def process_index():
    return dist.get_rank() if is_started() else 0


def new_group(processes, timeout):
    """A group of processes; all processes make all groups."""
    return dist.new_group(
        list(processes), timeout=datetime.timedelta(seconds=timeout)
    )


def gather_objects(value):
    """The picklable values of all processes, in their order."""
    values = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """The value of the first process."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@torch.no_grad()
def broadcast(variables, source, group=None):
    """Gives the variables the values that they have in process `source`."""
    for variable in variables:
        value = variable.value.detach().contiguous()
        dist.broadcast(value, source, group=group)
        variable.assign(value)


def add_up(tensors, group=None):
    """Sums over the processes of a group, each in the dtype of its tensor."""
    sums, bucket, size = [], [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_SIZE:
            sums += _add_up(bucket, group)
            bucket, size = [], 0
        bucket.append(tensor.detach())
        size += tensor.numel()
    return sums + _add_up(bucket, group)


def _add_up(bucket, group):
    if not bucket:
        return []
    # Half precision would round each partial sum.
    wide = any(tensor.dtype == torch.float64 for tensor in bucket)
    dtype = torch.float64 if wide else torch.float32
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in bucket])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    return [
        part.view(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, bucket, strict=True)
    ]


def gather_to_first(tensor, size, group):
    """The tensors of a group, one after the other, in its first process.

    Args:
        tensor: `(n, ...)`, the same shape in all.
        size: int. Number of processes in the group.

    Returns:
        A NumPy array `(size * n, ...)` in the first process, else `None`.
    """
    part = tensor.detach().cpu().contiguous()
    is_first = dist.get_group_rank(group, dist.get_rank()) == 0
    parts = [torch.empty_like(part) for _ in range(size)] if is_first else None
    dist.gather(part, parts, dst=dist.get_global_rank(group, 0), group=group)
    return torch.cat(parts) if is_first else None


def gather_rows(tensor):
    """The rows of all processes, and where those of this one start.

    Args:
        tensor: `(n, ...)`, with an `n` of each process.
    """
    tensor = tensor.detach()
    number = torch.tensor([tensor.shape[0]], device=tensor.device)
    numbers = [torch.empty_like(number) for _ in range(num_processes())]
    dist.all_gather(numbers, number)
    numbers = torch.cat(numbers).tolist()
    padded = tensor.new_zeros(max(numbers), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    parts = [part[:n] for part, n in zip(parts, numbers, strict=True)]
    return torch.cat(parts), sum(numbers[: process_index()])


def exchange_sizes(sizes, group):
    """`(S, n)`, a row for each process -> the rows meant for this one."""
    received = torch.empty_like(sizes)
    dist.all_to_all_single(received, sizes.contiguous(), group=group)
    return received


def first_link():
    """What the first of several exchanges in a row takes as `link`."""
    return torch.zeros((), requires_grad=torch.is_grad_enabled())


def exchange_rows(rows, link, send, receive, group, meanwhile=None):
    """Sends rows to the processes of a group, with a gradient.

    The gradients of exchanges travel too, and so must in the same order in all
    processes: each exchange takes the `link` of the one before it, so that
    the gradients of all exchanges come in reverse order, even of those whose
    result a process does not use.

    Args:
        rows: `(n, ...)`, those for the first process first.
        link: Scalar. `first_link()` or that of the exchange before.
        send, receive: lists of ints. Rows for and from each process.
        group: The group.
        meanwhile: Called while the rows travel. The gradients of what it
            computes are computed while those of the rows travel back. Defaults
            to `None`.

    Returns:
        `(rows, link)`, the received rows, those of the first process first.
    """
    trip = _Trip(send, receive, group)
    rows = _Leave.apply(rows, trip)
    if meanwhile is not None:
        meanwhile()
    return _Arrive.apply(rows, link, trip)


class _Trip:
    """Rows on the way to other processes, or their gradients on the way back.

    Args:
        send, receive, group: As for `exchange_rows`.
    """

    def __init__(self, send, receive, group):
        self.sizes = send, receive
        self.group = group
        self.work = None

    def start(self, rows, back=False):
        """The rows, which will not have arrived before `wait`."""
        send, receive = self.sizes[::-1] if back else self.sizes
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        rows = rows.contiguous()
        work = dist.all_to_all_single(
            received, rows, receive, send, group=self.group, async_op=True
        )
        self.work = work, rows, received  # the rows must stay until then
        return received

    def wait(self):
        """The rows that have arrived."""
        work, _, received = self.work
        work.wait()
        self.work = None
        return received


# Autograd computes the gradients of what was computed last first: those of
# what was done between leaving and arriving come while gradients travel.


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trip):
        ctx.trip = trip
        return trip.start(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_received):
        return ctx.trip.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, link, trip):
        trip.wait()
        ctx.trip = trip
        return rows.view_as(rows), link.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows, d_link):
        ctx.trip.start(d_rows, back=True)
        if not ctx.needs_input_grad[0]:  # `_Leave` will not be asked
            ctx.trip.wait()
        # `_Leave` takes what arrives instead, which has another shape.
        return d_rows, d_link, None


def wait():
    """Returns when all processes have come here."""
    if is_started():
        gather_objects(None)
