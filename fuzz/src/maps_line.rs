//! Lines of `/proc/self/maps`.

use uhmm_sys::maps::parse_line;

/// No line makes the parser panic, and a mapping that is found is one.
pub fn run(data: &[u8]) {
    for line in data.split(|byte| *byte == b'\n') {
        let Some(entry) = parse_line(line) else { continue };
        assert!(entry.range.start() < entry.range.end(), "{entry:?}");
        assert!(line.ends_with(entry.path), "{entry:?}");
        assert!(entry.path.first() != Some(&b' '), "{entry:?}");
    }
}

/// Lines as kernels write them.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts(&[
        "7f8a1000-7f8a2000 rw-p 00000000 00:00 0                          [heap]",
        "55d4c8a00000-55d4c8a02000 r--p 00000000 fe:01 1835042                    /usr/bin/cat",
        "7ffc1e1c5000-7ffc1e1e6000 rw-p 00000000 00:00 0                          [stack]",
        "7f0000000000-7f0000200000 rw-s 00000000 00:01 2058                       /memfd:x y (deleted)",
        "7f0000000000-7f0000200000 ---p 00000000 00:00 0 ",
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
        "7f8a1000-7f8a2000 rw-p 00000000 00:00 0                          [anon:uhmm-table]",
    ])
}
