//! The scenario of a seed.
//!
//! What    [`of_seed`]: its operations, which follow from the seed alone and from nothing that they lead to.
//! Why     two machines that play the same seed do the same, however far apart they are by then.

use crate::device::PRIVATE;
use crate::layout::Layout;
use crate::operation::{Kind, Operation, Pages, Protection, Request, WINDOW};
use crate::random::Random;

/// The devices of a scenario, by its seed: private ones, coherent ones, some of each.
const DEVICES: [&[u64]; 4] = [&[0, 1], &[2, 3], &[0, 2], &[0, 1, 2, 3]];
/// One seed in so many forks: what a child shares is compared less closely from then on.
const FORKS: u64 = 5;
/// One seed in so many with coherent devices forbids writing: a page that may not be written is not mapped in place by
/// ours.
const FORBIDS: u64 = 3;
/// The longest range.
const LONGEST: u64 = 8;

/// What is done, before the details are known.
#[derive(Clone, Copy)]
enum Verb {
    Map,
    Unmap,
    Protect,
    Discard,
    Read,
    Write,
    Device(Request),
    Use { write: bool },
    Reopen,
    Fork,
    ChildRead,
    ChildWrite,
    ChildExit,
}

const VERBS: [(u64, Verb); 21] = [
    (6, Verb::Map),
    (2, Verb::Unmap),
    (6, Verb::Protect),
    (3, Verb::Discard),
    (12, Verb::Read),
    (14, Verb::Write),
    (9, Verb::Device(Request::Read)),
    (9, Verb::Device(Request::Write)),
    (18, Verb::Device(Request::Migrate)),
    (6, Verb::Device(Request::Back)),
    (10, Verb::Device(Request::Snapshot)),
    (5, Verb::Device(Request::Exclusive)),
    (4, Verb::Device(Request::CheckExclusive)),
    (1, Verb::Device(Request::Release)),
    (4, Verb::Use { write: false }),
    (6, Verb::Use { write: true }),
    (1, Verb::Reopen),
    (2, Verb::Fork),
    (3, Verb::ChildRead),
    (3, Verb::ChildWrite),
    (1, Verb::ChildExit),
];

const KINDS: [(u64, Kind); 5] = [
    (24, Kind::Anonymous(Protection::Write)),
    (2, Kind::Anonymous(Protection::Read)),
    (1, Kind::Anonymous(Protection::None)),
    (2, Kind::Shared),
    (1, Kind::File),
];

const PROTECTIONS: [(u64, Protection); 3] =
    [(1, Protection::None), (4, Protection::Read), (7, Protection::Write)];

/// The devices that the scenario of `seed` opens.
pub(crate) const fn devices_of(seed: u64) -> &'static [u64] {
    DEVICES[(seed % DEVICES.len() as u64) as usize]
}

/// Whether coherent devices are among them.
pub(crate) fn has_coherent(seed: u64) -> bool {
    devices_of(seed).iter().any(|device| *device >= PRIVATE)
}

/// The scenario of `seed`. It ends with a look at everything.
pub(crate) fn of_seed(seed: u64) -> Vec<Operation> {
    let mut random = Random::new(seed);
    let devices = devices_of(seed);
    let whole = Pages { first: 0, count: WINDOW };
    let mut operations: Vec<Operation> = vec![Operation::Map(
        Kind::Anonymous(Protection::Write),
        Pages { first: 0, count: 8 + random.below(9) },
    )];
    let mut layout = Layout::new(has_coherent(seed));
    layout.apply(&operations[0]);
    let mut child = false;
    let forks = seed.is_multiple_of(FORKS);
    let coherent = has_coherent(seed);
    let forbids = !coherent || seed.is_multiple_of(FORBIDS);
    // The kernel's module, asked to give up a coherent device's memory while a page of it is lent, waits for good.
    let lends = !coherent || seed % 8 < 4;
    for _ in 0..24 + random.below(33) {
        let verb = random.weighted(&VERBS);
        let verb = match verb {
            verb if is_about_child(verb) && !forks => continue,
            Verb::Protect if !forbids => continue,
            Verb::Device(Request::Exclusive) if !lends => Verb::Device(Request::Migrate),
            Verb::Device(Request::Release) if coherent => Verb::Reopen,
            verb => verb,
        };
        // A child is made where something is asked of one that is not there.
        let operation = match verb {
            _ if is_about_child(verb) && !child => {
                child = true;
                Operation::Fork
            }
            Verb::Fork | Verb::ChildExit => {
                child = false;
                Operation::ChildExit
            }
            _ => match detail(verb, &mut random, devices) {
                Operation::Map(Kind::Anonymous(Protection::Read), pages) if !forbids => {
                    Operation::Map(Kind::Anonymous(Protection::Write), pages)
                }
                operation => settle(operation, &layout),
            },
        };
        layout.apply(&operation);
        operations.push(operation);
    }
    operations.push(Operation::Read(whole));
    operations.extend(devices.iter().map(|device| Operation::Device {
        request: Request::Snapshot,
        device: *device,
        pages: whole,
        nowhere: false,
    }));
    operations
}

/// Keeps away from what would be left to chance.
fn settle(operation: Operation, layout: &Layout) -> Operation {
    match operation {
        // How many pages are written before a hole is found depends on what the device's table still knows.
        Operation::Device { request: Request::Write, device, pages, nowhere } => {
            let count = layout.writable(pages);
            let pages = if count == 0 { pages } else { Pages { count, ..pages } };
            Operation::Device { request: Request::Write, device, pages, nowhere }
        }
        // Whether memory that cannot be migrated counts as migrated, likewise.
        Operation::Use { device, pages, .. } if layout.has_plain(pages) => {
            Operation::Device { request: Request::Migrate, device, pages, nowhere: false }
        }
        Operation::Use { write: true, device, pages } if !layout.is_calm(pages) => {
            Operation::Use { write: false, device, pages }
        }
        operation => operation,
    }
}

const fn is_about_child(verb: Verb) -> bool {
    matches!(verb, Verb::Fork | Verb::ChildRead | Verb::ChildWrite | Verb::ChildExit)
}

fn detail(verb: Verb, random: &mut Random, devices: &[u64]) -> Operation {
    let first = random.below(WINDOW);
    let pages = Pages { first, count: 1 + random.below(LONGEST.min(WINDOW + 1 - first)) };
    let device = devices[random.below(devices.len() as u64) as usize];
    match verb {
        Verb::Map => Operation::Map(random.weighted(&KINDS), pages),
        Verb::Unmap => Operation::Unmap(pages),
        Verb::Protect => Operation::Protect(random.weighted(&PROTECTIONS), pages),
        Verb::Discard => Operation::Discard(pages),
        Verb::Read => Operation::Read(pages),
        Verb::Write => Operation::Write(pages),
        Verb::Device(request) => Operation::Device { request, device, pages, nowhere: random.below(32) == 0 },
        Verb::Use { write } => Operation::Use { write, device, pages },
        Verb::Reopen => Operation::Reopen(device),
        Verb::ChildRead => Operation::ChildRead(pages),
        Verb::ChildWrite => Operation::ChildWrite(pages),
        Verb::Fork => Operation::Fork,
        Verb::ChildExit => Operation::ChildExit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every scenario, step by step, with what is known before each.
    fn each_step(mut look: impl FnMut(u64, &Layout, &Operation)) {
        for seed in 0..500 {
            let mut layout = Layout::new(has_coherent(seed));
            for operation in of_seed(seed) {
                look(seed, &layout, &operation);
                layout.apply(&operation);
            }
        }
    }

    #[test]
    fn a_seed_is_a_scenario() {
        assert_eq!(of_seed(7), of_seed(7));
        assert_ne!(of_seed(7), of_seed(8));
        assert_eq!(of_seed(1)[0].to_string(), "map 0+12 anon-write");
    }

    #[test]
    fn devices_write_to_the_end_or_not_at_all() {
        each_step(|seed, layout, operation| {
            if let Operation::Device { request: Request::Write, pages, .. } = operation {
                assert!([0, pages.count].contains(&layout.writable(*pages)), "{seed} {operation}");
            }
            if let Operation::Use { write: true, pages, .. } = operation {
                assert!(layout.is_calm(*pages), "{seed} {operation}");
            }
        });
    }

    #[test]
    fn coherent_devices_are_never_emptied() {
        each_step(|seed, _, operation| {
            if let Operation::Device { request: Request::Release, .. } = operation {
                assert!(!has_coherent(seed), "{seed} {operation}");
            }
        });
    }

    #[test]
    fn most_of_what_is_compared_may_not_differ() {
        let (mut pages, mut strict) = (0, 0);
        each_step(|_, layout, operation| {
            let marks = operation.pages().map(|pages| layout.marks(pages).to_string()).unwrap_or_default();
            pages += marks.len();
            strict += marks.matches(['s', '-']).count();
        });
        assert!(strict * 10 > pages * 8, "{strict} of {pages}");
    }
}
