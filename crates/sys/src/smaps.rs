//! What a mapping has besides addresses and permissions: the line `VmFlags` of `/proc/self/smaps`.
//!
//! What     [`plain`]: whether the mappings of a range have nothing that a fresh private mapping would lack.
//! Why      a mapping that is to take another one's place must be like it. Locked, kept out of a fork or a dump, advised
//!          about, of a protection key, of a device: what is not known to be harmless counts as special.
//! Fails    with the error of the read; also where the kernel does not tell.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use uhmm_addr::VaRange;

use crate::maps::parse_line;

/// What is known of mappings without special properties.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plain {
    /// The kernel counts their pages as promised memory (`VM_ACCOUNT`).
    pub accounted: bool,
}

/// Permissions and what may become of them; accounted or not; written since somebody last asked.
const HARMLESS: [&[u8]; 8] = [b"rd", b"wr", b"mr", b"mw", b"me", b"ac", b"nr", b"sd"];

/// Tells whether the mappings of `range` are plain; `None` if one of them is not. Reads as far as the end of the range.
pub fn plain(range: VaRange) -> io::Result<Option<Plain>> {
    plain_in(BufReader::new(File::open("/proc/thread-self/smaps")?), range)
}

fn plain_in(mut lines: impl BufRead, range: VaRange) -> io::Result<Option<Plain>> {
    let (mut line, mut inside) = (Vec::new(), false);
    let mut found = None;
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = line.trim_ascii_end();
        if let Some(entry) = parse_line(text) {
            if entry.range.first() >= range.end_page() {
                break;
            }
            inside = entry.range.intersect(range).is_some();
        } else if inside && let Some(key) = text.strip_prefix(b"ProtectionKey:") {
            if key.trim_ascii() != b"0" {
                return Ok(None);
            }
        } else if inside && let Some(flags) = text.strip_prefix(b"VmFlags:") {
            let mut flags = flags.split(u8::is_ascii_whitespace).filter(|flag| !flag.is_empty());
            let accounted = flags.clone().any(|flag| flag == b"ac");
            let alike = found.is_none_or(|found: Plain| found.accounted == accounted);
            if !alike || !flags.all(|flag| HARMLESS.contains(&flag)) {
                return Ok(None);
            }
            found = Some(Plain { accounted });
        }
        line.clear();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_addr::VirtAddr;

    const TEXT: &str = "\
7f0000000000-7f0000002000 rw-p 00000000 fe:00 7    /tmp/a file
Size:                  8 kB
VmFlags: rd wr mr mw me ac sd
7f0000002000-7f0000003000 rw-p 00002000 fe:00 7    /tmp/a file
Size:                  4 kB
VmFlags: rd wr mr mw me lo ac
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me
";

    fn of(first: usize, pages: usize) -> Option<Plain> {
        let start = VirtAddr::new(0x7f00_0000_0000 + first * 4096);
        plain_in(TEXT.as_bytes(), VaRange::new(start, pages * 4096).unwrap()).unwrap()
    }

    #[test]
    fn what_is_not_known_to_be_harmless_is_special() {
        assert_eq!(of(0, 2), Some(Plain { accounted: true }));
        assert_eq!(of(1, 1), Some(Plain { accounted: true }));
        assert_eq!(of(1, 2), None, "a locked page");
        assert_eq!(of(4, 1), Some(Plain { accounted: false }));
        assert_eq!(of(3, 1), None, "a hole");
    }

    #[test]
    fn the_running_kernel_tells() {
        let memory = crate::mapping::Mapping::reserve(4096, "").unwrap();
        assert_eq!(plain(memory.range()).unwrap(), Some(Plain { accounted: false }));
        memory.dont_dump().unwrap();
        assert_eq!(plain(memory.range()).unwrap(), None);
    }
}
