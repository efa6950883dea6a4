"""Every command of the protocol through libnbd, in the words of its document. Takes a URI of a writable
disk of zeros, at least 16 MiB; run by clients.rs with the Python that python3-libnbd belongs to."""

import errno
import sys

import nbd

MIB = 1 << 20
uri = sys.argv[1]


def options():
    """The handshake, step by step."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    assert h.get_protocol() == "newstyle-fixed"
    names = []
    h.opt_list(lambda name, description: names.append(name))
    assert names == [h.get_export_name()], names
    h.add_meta_context("base:allocation")
    contexts = []
    h.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    h.opt_info()
    size = h.get_size()
    h.opt_go()
    assert h.get_size() == size
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    h.set_export_name("no such export")
    fails(errno.ENOENT, h.opt_go)
    h.opt_abort()


def fails(number, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError("it was to fail with %s" % errno.errorcode[number])


def status(h, count, offset, flags=0):
    """The extents of a range: (length, state) each."""
    found = []

    def entry(context, at, entries, error):
        assert (context, at) == ("base:allocation", offset)
        found.extend(zip(entries[::2], entries[1::2]))

    h.block_status(count, offset, entry, flags)
    return found


def writes(h):
    data = bytes(range(256)) * 256
    h.pwrite(data, 3)
    assert h.pread(len(data), 3) == data
    h.pwrite(data, MIB, nbd.CMD_FLAG_FUA)
    h.flush()
    h.cache(MIB, 0)
    assert h.pread(len(data), MIB) == data
    fails(errno.EINVAL, h.pread, 1, h.get_size())
    fails(errno.ENOSPC, h.pwrite, b"x", h.get_size())


def structured(h):
    """A read may come in pieces, which tile what was asked for; with DF in one."""
    h.pwrite(b"a" * 65536, 4 * MIB)
    pieces = []

    def piece(part, at, state, error):
        pieces.append((at, len(part), state))

    got = h.pread_structured(2 * MIB, 4 * MIB, piece)
    assert got == b"a" * 65536 + bytes(2 * MIB - 65536)
    next_offset = 4 * MIB
    for at, length, state in sorted(pieces):
        assert at == next_offset and state in (nbd.READ_DATA, nbd.READ_HOLE), pieces
        next_offset += length
    assert next_offset == 6 * MIB, pieces
    pieces.clear()
    h.pread_structured(65536 * 2, 4 * MIB, piece, nbd.CMD_FLAG_DF)
    assert len(pieces) == 1, pieces


def zeroes(h):
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    at = 8 * MIB
    assert status(h, MIB, at) == [(MIB, hole)]
    h.pwrite(b"b" * MIB, at)
    assert status(h, MIB, at) == [(MIB, 0)]
    assert len(status(h, 2 * MIB, at)) == 2
    assert len(status(h, 2 * MIB, at, nbd.CMD_FLAG_REQ_ONE)) == 1
    h.zero(65536, at, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert h.pread(65536, at) == bytes(65536)
    h.zero(65536, at + 65536)
    h.trim(65536, at + 131072, nbd.CMD_FLAG_FUA)
    h.flush()
    assert h.pread(MIB - 196608, at + 196608) == b"b" * (MIB - 196608)
    try:
        h.zero(65536, at + 262144, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        assert error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), error
    else:
        assert h.pread(65536, at + 262144) == bytes(65536)


def many_in_flight(h):
    """What is answered out of order still belongs to its request."""
    buffers = [nbd.Buffer.from_bytearray(bytearray([i]) * 4096) for i in range(200)]
    cookies = {h.aio_pwrite(buffer, 12 * MIB + 4096 * i) for i, buffer in enumerate(buffers)}
    while cookies:
        cookies -= {cookie for cookie in cookies if h.aio_command_completed(cookie)}
        if cookies:
            h.poll(-1)
    for i in range(200):
        assert h.pread(4096, 12 * MIB + 4096 * i) == bytes([i]) * 4096


def several_connections(h):
    """A flush on one connection covers what was answered on another."""
    assert h.can_multi_conn()
    other = nbd.NBD()
    other.connect_uri(uri)
    h.pwrite(b"seen", 2 * MIB)
    other.flush()
    assert other.pread(4, 2 * MIB) == b"seen"
    other.shutdown()


options()
handle = nbd.NBD()
handle.add_meta_context("base:allocation")
handle.connect_uri(uri)
assert handle.get_structured_replies_negotiated()
for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
    assert getattr(handle, "can_" + can)(), can
assert not handle.is_read_only()
for part in (writes, structured, zeroes, many_in_flight, several_connections):
    part(handle)
handle.shutdown()
