//! What the reference says of it.

pub(super) const DOC: &str = "Stands above a slow or far disk. Without `path` the cache is in memory and begins empty; with `path` it is a file or \
a block device on an SSD, which belongs to the disk below and is kept over restarts. docs/cache.md says which mode is for what.\n\n\
Reads: what is missing is read from below in whole lines, each once, whoever waits for it. Streams are read ahead, and long ones are \
not kept. A line stays because it is asked for again: a scan drives out what was read once, not what is read often.\n\n\
`write_through`: a change is answered when the disk below has answered it; flushes and FUA go below. What survives is up to the disk below.\n\n\
`write_back` in memory, with `(lossy yes)`: a change is answered at once, and lost if this process dies before it is below. A flush, and \
FUA, is answered when all that was answered before is below and the disk below has been flushed.\n\n\
`write_back` on an SSD: a change is answered when its record and all before it have been written to the log, and outlives this process. \
A flush, and FUA, is answered when the file has been flushed, and what it covers outlives a loss of power; with `(durability remote)` when \
the disk below has it and has been flushed. After a loss of power the disk is what it was after some change: a prefix, which reaches at least to the last \
flush. A write of up to 1 MiB, or a quarter of the log, is there as a whole or not at all (`atomic`). Discards become zeros.\n\n\
Changes go below in their order, in batches of up to 24 MiB and 8192 changes, each followed by a flush, with the origin `write_back`. The next batch begins when that has \
been answered. So a disk that commits what comes between two flushes is a prefix at any time, also when the SSD is lost. \
Within a batch the newest bytes of each place are written, in any order: any other disk may be between two batches.\n\n\
When the log is full, or the disk below fails, changes wait; reads of what the cache has go on. It is tried again after 1 to 30 seconds, and \
`mason events` says so. When the SSD fails, what it has goes below and the cache is not used until `resume`. What can be read nowhere else is answered with EIO; \
so are all changes if what only the SSD had is lost, or if it cannot be marked as empty.\n\n\
A cache with changes does not leave its graph before `drain` has brought them below. One on an SSD is not changed as it runs, but for `rate` and \
`dirty_time`, nor handed over to another process. The format is described in docs/formats/cache.md.";
