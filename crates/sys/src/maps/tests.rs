use uhmm_addr::{PAGE_SIZE, VirtAddr};

use super::*;

#[test]
fn lines_parse() {
    let line = b"7ffe1000-7ffe3000 rw-p 00000000 00:00 0                          [stack]";
    let entry = parse_line(line).unwrap();
    assert_eq!((entry.range.start().get(), entry.range.pages().get()), (0x7ffe_1000, 2));
    assert!(entry.read && entry.write && !entry.exec && !entry.shared);
    assert_eq!((entry.inode, entry.path), (0, &b"[stack]"[..]));

    let line = b"00400000-00401000 r-xs 00001000 fd:01 1234567  /a path/with blanks (deleted)";
    let entry = parse_line(line).unwrap();
    assert!(entry.exec && entry.shared);
    assert_eq!((entry.inode, entry.path), (1_234_567, &b"/a path/with blanks (deleted)"[..]));

    let line = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
    assert_eq!(parse_line(line).unwrap().path, b"[vsyscall]");
    assert_eq!(parse_line(b"1000-2000 ---p 0 00:00 0 ").unwrap().path, b"");
}

#[test]
fn lines_that_make_no_sense_are_refused() {
    for line in [
        &b""[..],
        b"-",
        b"1000-1000 rw-p 0 00:00 0",
        b"2000-1000 rw-p 0 00:00 0",
        b"1001-2000 rw-p 0 00:00 0",
        b"1000-2000 rw-q 0 00:00 0",
        b"1000-2000 zw-p 0 00:00 0",
        b"1000-2000 rw",
        b"1000-2000 rw-p 0 00:00",
        b"10000000000000000-20000000000000000 rw-p 0 00:00 0",
        b"1000-2000 rw-p 0 00:00 99999999999999999999999",
        b"\xff\xfe",
    ] {
        assert_eq!(parse_line(line), None, "{}", line.escape_ascii());
    }
}

#[test]
fn any_prefix_and_any_flipped_byte_is_safe() {
    let line = b"7ffe1000-7ffe3000 rw-p 00000000 00:00 0                          [stack]";
    for end in 0..line.len() {
        let _ = parse_line(&line[..end]);
        for byte in 0..=255 {
            let mut copy = *line;
            copy[end] = byte;
            let _ = parse_line(&copy);
        }
    }
}

/// A buffer far smaller than a line grows and cuts lines anywhere; the list is the same.
#[test]
fn lines_across_the_buffer_are_whole() {
    let local = 0_u8;
    let here = VirtAddr::of(&raw const local).page();
    for size in [1, 7, 100, 4096, 16 << 10] {
        let mut reader = MapsReader::with_buffer(size).unwrap();
        for _ in 0..2 {
            let mut last_end = VirtAddr::new(0);
            let mut found = 0;
            let mut code = false;
            reader
                .for_each(|entry| {
                    assert!(entry.range.start() >= last_end, "{entry:?} after {last_end}");
                    last_end = entry.range.end();
                    found += usize::from(entry.range.contains(here) && entry.write);
                    code |= entry.exec && entry.inode != 0 && entry.path.starts_with(b"/");
                })
                .unwrap();
            assert_eq!((found, code), (1, true), "with a buffer of {size}");
        }
    }
    assert_eq!(PAGE_SIZE, 4096);
}
