//! Two outputs of `uhmm-scenario`, word by word.
//!
//! What    [`Steps`], an output taken apart; [`compare`], which finds for each step that both say the same, or why they
//!         need not, or that they differ.
//! Why     the kernel's page tables, and the devices' tables that follow them, do what nobody can do who is not the
//!         kernel; and its test module forgets more than it must. What may differ for that reason, and nothing else,
//!         is told by [`Reason`]. `docs/oracle.md` explains each.
//! Fails   nothing here fails.

use std::collections::BTreeMap;

/// `HMM_DMIRROR_PROT_ERROR`.
const ERROR: u8 = 0xff;
const NONE: u8 = 0;
/// The bits of permission: read, write.
const PERMISSION: u8 = 0x03;
const READ: u8 = 0x01;

/// Why two results need not be the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Reason {
    /// The kernel's device has forgotten pages that its table could have kept.
    Forgotten,
    /// Ours keeps no table of memory that no page leaves.
    NoTable,
    /// Whether a page may be written at once stands in the page table.
    WriteBit,
    /// A page is elsewhere: forked, lent by a coherent device, or not to be written where it would be mapped in place.
    Place,
}

impl Reason {
    pub(crate) const ALL: [Self; 4] = [Self::Forgotten, Self::NoTable, Self::WriteBit, Self::Place];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Forgotten => "forgotten",
            Self::NoTable => "no-table",
            Self::WriteBit => "write-bit",
            Self::Place => "place",
        }
    }
}

/// One step, as it was printed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    pub(crate) operation: String,
    /// A letter for each page of the operation.
    pub(crate) marks: String,
    pub(crate) result: String,
}

/// Where a step belongs: its seed, and its number, or `None` for what is said of a whole seed.
pub(crate) type Place = (u64, Option<u64>);

/// An output.
pub(crate) type Steps = BTreeMap<Place, Step>;

/// Takes a line apart. `None` if it is none of a step's.
pub(crate) fn parse(line: &str) -> Option<(Place, Step)> {
    let (left, result) = line.split_once(" | ")?;
    let mut words = left.splitn(3, ' ');
    let seed = words.next()?.parse().ok()?;
    let step = match words.next()? {
        "-" => None,
        step => Some(step.parse().ok()?),
    };
    let rest = words.next()?;
    let (operation, marks) =
        rest.strip_suffix(']').and_then(|rest| rest.split_once(" [")).unwrap_or((rest, ""));
    let told = Step { operation: operation.into(), marks: marks.into(), result: result.trim_end().into() };
    Some(((seed, step), told))
}

/// What a comparison found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Same,
    /// They differ only in what may, for these reasons.
    Explained(Vec<Reason>),
    Different,
}

/// Compares what the kernel's device and ours say of a step.
pub(crate) fn compare(kernel: &Step, ours: &Step) -> Verdict {
    if (&kernel.operation, &kernel.marks) != (&ours.operation, &ours.marks) {
        return Verdict::Different;
    }
    if kernel.result == ours.result {
        return Verdict::Same;
    }
    let mut look = Look { marks: &kernel.marks, reasons: Vec::new() };
    let request = kernel.operation.split(' ').next().unwrap_or_default();
    let (kernel, ours): (Vec<&str>, Vec<&str>) =
        (kernel.result.split("; ").collect(), ours.result.split("; ").collect());
    if look.step(request, &kernel, &ours).is_none() {
        return Verdict::Different;
    }
    look.reasons.sort_unstable();
    look.reasons.dedup();
    Verdict::Explained(look.reasons)
}

/// What a request answered.
#[derive(PartialEq, Eq)]
enum Answer<'a> {
    Done {
        pages: &'a str,
        faults: &'a str,
        data: Vec<&'a str>,
    },
    /// An error, or what a program's own touches found.
    Other(&'a str),
}

impl<'a> Answer<'a> {
    fn of(text: &'a str) -> Self {
        let words: Vec<&str> = text.split(' ').collect();
        match words.as_slice() {
            ["ok", "pages", pages, "faults", faults, data @ ..] => {
                Self::Done { pages, faults, data: data.iter().skip(1).copied().collect() }
            }
            _ => Self::Other(text),
        }
    }
}

struct Look<'a> {
    marks: &'a str,
    reasons: Vec<Reason>,
}

/// `None` where there is a difference that nothing explains.
type Explained = Option<()>;

impl Look<'_> {
    fn has(&self, mark: char) -> bool {
        self.marks.contains(mark)
    }

    /// One of the reasons that the marks give, if any.
    fn because(&mut self, reasons: &[(char, Reason)]) -> Explained {
        let (_, reason) = reasons.iter().find(|(mark, _)| self.has(*mark))?;
        self.reasons.push(*reason);
        Some(())
    }

    fn step(&mut self, request: &str, kernel: &[&str], ours: &[&str]) -> Explained {
        match (request, kernel, ours) {
            ("snapshot", [kernel], [ours]) => self.snapshot(kernel, ours),
            ("back", [kernel, seen], [ours, our_view]) => {
                self.answer(kernel, ours)?;
                self.snapshot(seen, our_view)
            }
            ("migrate", [kernel, seen], [ours, our_view]) => {
                self.migrated(kernel, ours, seen)?;
                self.snapshot(seen, our_view)
            }
            // A page that the device before it has forgotten as well.
            ("check-exclusive", ["ok pages 0 faults 0"], ["errno 1"]) => {
                self.reasons.push(Reason::Forgotten);
                Some(())
            }
            ("use-read" | "use-write", [kernel, last], [ours, our_last]) => {
                if Answer::of(kernel) == Answer::of(ours) && kernel.starts_with("errno") {
                    return self.snapshot(last, our_last);
                }
                if kernel.starts_with("errno") != ours.starts_with("errno") {
                    return self.because(&[('l', Reason::Place)]);
                }
                self.answer(kernel, ours)?;
                self.answer(last, our_last)
            }
            ("dev-read" | "dev-write", kernel, ours) if kernel.len() == ours.len() => {
                kernel.iter().zip(ours).try_for_each(|(kernel, ours)| self.answer(kernel, ours))
            }
            _ => None,
        }
    }

    /// Whether pages were migrated; `seen` is what the kernel's device sees afterwards.
    fn migrated(&mut self, kernel: &str, ours: &str, seen: &str) -> Explained {
        match (Answer::of(kernel), Answer::of(ours)) {
            (Answer::Other("errno 2"), Answer::Done { .. } | Answer::Other("errno 14"))
                if all_there(seen) =>
            {
                self.reasons.push(Reason::Forgotten);
                Some(())
            }
            (Answer::Other("errno 2"), Answer::Done { .. })
            | (Answer::Done { .. }, Answer::Other("errno 2")) => {
                self.because(&[('l', Reason::Place), ('p', Reason::NoTable)])
            }
            _ => self.answer(kernel, ours),
        }
    }

    /// An answer with the pages' contents, or none.
    fn answer(&mut self, kernel: &str, ours: &str) -> Explained {
        let (kernel, ours) = (Answer::of(kernel), Answer::of(ours));
        if kernel == ours {
            return Some(());
        }
        let (
            Answer::Done { pages, faults, data },
            Answer::Done { pages: our_pages, faults: our_faults, data: our_data },
        ) = (kernel, ours)
        else {
            return None;
        };
        if data != our_data {
            return None;
        }
        if pages != our_pages {
            self.because(&[('l', Reason::Place)])?;
        }
        match (faults, our_faults) {
            ("1", "0") => self.reasons.push(Reason::Forgotten),
            ("0", "1") => self.because(&[('p', Reason::NoTable), ('l', Reason::Place)])?,
            (kernel, ours) if kernel == ours => {}
            _ => return None,
        }
        Some(())
    }

    fn snapshot(&mut self, kernel: &str, ours: &str) -> Explained {
        if kernel == ours {
            return Some(());
        }
        let (kernel, ours) = (bytes(kernel)?, bytes(ours)?);
        if kernel.len() != ours.len() || kernel.len() != self.marks.len() {
            return None;
        }
        for ((kernel, ours), mark) in kernel.iter().zip(&ours).zip(self.marks.chars()) {
            let permission = kernel ^ ours == PERMISSION && kernel & PERMISSION == READ;
            let reason = match mark {
                _ if kernel == ours => continue,
                'w' if permission => Reason::WriteBit,
                'l' if *kernel != ERROR && *ours != ERROR => Reason::Place,
                _ => return None,
            };
            self.reasons.push(reason);
        }
        Some(())
    }
}

/// The bytes of a snapshot that was answered.
fn bytes(text: &str) -> Option<Vec<u8>> {
    match Answer::of(text) {
        Answer::Done { data, .. } => data.iter().map(|byte| u8::from_str_radix(byte, 16).ok()).collect(),
        Answer::Other(_) => None,
    }
}

/// Whether the device could have known all pages.
fn all_there(seen: &str) -> bool {
    bytes(seen).is_some_and(|bytes| bytes.iter().all(|byte| ![NONE, ERROR].contains(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(left: &str, kernel: &str, ours: &str) -> Verdict {
        let step = |result: &str| parse(&format!("7 3 {left} | {result}")).unwrap().1;
        compare(&step(kernel), &step(ours))
    }

    #[test]
    fn a_line_is_taken_apart() {
        let (place, step) =
            parse("12 3 migrate 4+2 dev0 [sl] | errno 2; ok pages 2 faults 0 data 22 0").unwrap();
        assert_eq!(place, (12, Some(3)));
        assert_eq!((&*step.operation, &*step.marks), ("migrate 4+2 dev0", "sl"));
        assert_eq!(parse("12 - end | signal 11").unwrap().0, (12, None));
        assert_eq!(parse("[   4.3] BUG: unable to handle page fault | x"), None);
    }

    #[test]
    fn contents_are_never_explained() {
        for marks in ["[s]", "[w]", "[l]", "[p]"] {
            for request in ["read 4+1", "child-read 4+1", "dev-read 4+1 dev0", "exclusive 4+1 dev0"] {
                let told = |data: &str| format!("ok pages 1 faults 0 data {data}");
                let different = verdict(&format!("{request} {marks}"), &told("abc"), &told("abd"));
                assert_eq!(different, Verdict::Different, "{request} {marks}");
            }
        }
    }

    #[test]
    fn the_kernel_may_forget_and_we_may_not() {
        let (one, none) = ("ok pages 2 faults 1 data a b", "ok pages 2 faults 0 data a b");
        let forgotten = Verdict::Explained(vec![Reason::Forgotten]);
        assert_eq!(verdict("dev-read 4+2 dev0 [ss]", one, none), forgotten);
        assert_eq!(verdict("dev-read 4+2 dev0 [ss]", none, one), Verdict::Different);
        let no_table = Verdict::Explained(vec![Reason::NoTable]);
        assert_eq!(verdict("dev-read 4+2 dev0 [sp]", none, one), no_table);
        let there = "; ok pages 1 faults 0 data 22";
        let (lost, kept) = (format!("errno 2{there}"), format!("ok pages 1 faults 0 data a{there}"));
        assert_eq!(verdict("migrate 4+1 dev0 [s]", &lost, &kept), forgotten);
        assert_eq!(verdict("migrate 4+1 dev0 [s]", &kept, &lost), Verdict::Different);
        // Not where the page is elsewhere, or nowhere to be seen.
        for [kernel, ours] in [["2", "22"], ["0", "0"]] {
            let (lost, kept) = (lost.replace("22", kernel), kept.replace("22", ours));
            assert_eq!(verdict("migrate 4+1 dev0 [s]", &lost, &kept), Verdict::Different);
        }
    }

    #[test]
    fn a_snapshot_differs_where_its_page_may() {
        let seen = |byte: &str| format!("ok pages 2 faults 0 data 2 {byte}");
        let of = |marks: &str, kernel: &str, ours: &str| {
            verdict(&format!("snapshot 4+2 dev0 [{marks}]"), &seen(kernel), &seen(ours))
        };
        let explained = |reason| Verdict::Explained(vec![reason]);
        assert_eq!(of("ss", "1", "2"), Verdict::Different);
        assert_eq!(of("sw", "1", "2"), explained(Reason::WriteBit));
        assert_eq!(of("sw", "2", "1"), Verdict::Different);
        assert_eq!(of("sw", "22", "2"), Verdict::Different);
        assert_eq!(of("sl", "42", "2"), explained(Reason::Place));
        assert_eq!(of("ls", "42", "2"), Verdict::Different);
        assert_eq!(of("sl", "ff", "2"), Verdict::Different);
        assert_eq!(of("-s", "0", "0"), Verdict::Same);
    }

    #[test]
    fn errors_are_compared() {
        assert_eq!(verdict("exclusive 4+1 dev0 [l]", "errno 16", "errno 2"), Verdict::Different);
        assert_eq!(verdict("map 4+1 shared [-]", "ok", "errno 12"), Verdict::Different);
        assert_eq!(verdict("map 4+1 shared [-]", "ok", "ok"), Verdict::Same);
    }
}
