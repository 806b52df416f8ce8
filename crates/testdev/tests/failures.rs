//! A fixed script in which every step fails in turn, and random scripts against a plain model.
//!
//! Whatever fails, the program reads what it wrote, or gets SIGBUS for a page whose *device* could not give it
//! back; and nothing is left in use at the end.

use std::collections::BTreeMap;

use proptest::prelude::*;
use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::device::{MemoryType, TransferError};
use uhmm_core::frame::Slot;
use uhmm_core::host::Stop;
use uhmm_core::migrate::{Select, Sources};
use uhmm_core::mirror::{MirrorTable, PageView, Segment, Terms};
use uhmm_core::notifier::Event;
use uhmm_core::stats::Skipped;
use uhmm_testdev::sim_host::{Attempts, Bed, Killed, Setup, page_at, pages_at};

/// Pages that scripts use; as many behind them are where mappings move to.
const PAGES: usize = 48;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Store(usize, u64),
    Load(usize),
    Migrate(usize, usize),
    MigrateCold(usize, usize),
    /// Pages of the first device go to the other one, and the other way round.
    Across(usize, usize),
    Return(usize, usize),
    /// Pages of the other device come home.
    Recall(usize, usize),
    /// Holes get pages of the other device.
    Holes(usize, usize),
    /// The first device is emptied, home or to the other one.
    Evict {
        home: bool,
    },
    Stage(usize, usize),
    WriteBack,
    /// A device gets pages for itself, and adds one to each that it got.
    Exclusive(usize, usize),
    EndLoans(usize, usize),
    Prefetch(usize, usize),
    DontNeed(usize, usize),
    Unmap(usize, usize),
    /// Moves the mapping to the other half and what is there to nowhere.
    Remap(usize, usize),
    /// What only the kernel knows: pages pinned for DMA.
    HoldForDma(usize, bool),
    Pin(usize, usize, bool),
    Track(bool),
    Trim,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failure {
    Host(Stop),
    Device(TransferError),
    Other(TransferError),
}

/// The frames that a device has for itself.
#[derive(Default)]
struct Frames(BTreeMap<Vpn, VirtAddr>);

impl MirrorTable for Frames {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        range.iter().for_each(|page| _ = self.0.remove(&page));
    }
}

/// What the n-th page holds, as far as the program knows. Pages that are not in the map are zeros.
#[derive(Default)]
struct Model {
    values: BTreeMap<usize, u64>,
    lost: usize,
}

struct Script {
    bed: Bed,
    model: Model,
    staged: Vec<Slot>,
}

impl Script {
    fn new(setup: Setup) -> Self {
        Self { bed: Bed::new(setup), model: Model::default(), staged: Vec::new() }
    }

    fn lost(&mut self, n: usize) {
        self.model.lost += 1;
        // As a program does that handles SIGBUS: the page is given up and starts anew.
        self.bed.program.dontneed(pages_at(n, 1));
        self.model.values.remove(&n);
    }

    fn load(&mut self, n: usize) {
        match self.bed.program.load(page_at(n)) {
            Ok(value) => {
                let expected = self.model.values.get(&n).copied().unwrap_or(0);
                assert_eq!(value, expected, "page {n}, {:?}", self.bed.word(n));
            }
            Err(Killed::Bus) => self.lost(n),
            Err(other) => panic!("page {n} {other:?}: {:?}", self.bed.word(n)),
        }
    }

    fn store(&mut self, n: usize, value: u64) {
        match self.bed.program.store(page_at(n), value) {
            Ok(()) => {
                self.model.values.insert(n, value);
            }
            Err(Killed::Bus) => self.lost(n),
            Err(other) => panic!("page {n} {other:?}: {:?}", self.bed.word(n)),
        }
    }

    fn run(&mut self, op: Op) {
        let bed = &self.bed;
        match op {
            Op::Store(n, value) => self.store(n, value),
            Op::Load(n) => self.load(n),
            Op::Migrate(n, pages) => {
                let result = bed.mm.migrate(pages_at(n, pages), bed.mm.epoch(), &bed.pagemap, Select::All);
                assert_eq!(result.moved.get() + result.skipped.total() as usize, pages, "{result:?}");
            }
            Op::MigrateCold(n, pages) => {
                let _ = bed.mm.migrate(
                    pages_at(n, pages),
                    bed.mm.epoch(),
                    &bed.pagemap,
                    Select::Cold { lap: n as u32 },
                );
            }
            Op::Across(n, pages) => {
                let _ = bed.migrate_across(n, pages);
            }
            Op::Return(n, pages) => {
                let owner = Some(bed.other_map.owner());
                let sources = Sources { private: owner, coherent: owner, ..Sources::NONE };
                let _ = bed.migrate_from(n, pages, &bed.pagemap, &sources);
            }
            Op::Recall(n, pages) => {
                let (range, map) = (pages_at(n, pages), bed.other_map.range());
                let _ = bed.program.with_scratch(|scratch| bed.mm.evict_pfns(range, map, None, scratch));
            }
            Op::Holes(n, pages) => {
                let sources = Sources { holes: true, ..Sources::NONE };
                let _ = bed.migrate_from(n, pages, &bed.other_map, &sources);
            }
            Op::Evict { home } => {
                let to = (!home).then_some(&bed.other_map);
                let _ = bed.evict(to);
            }
            Op::Stage(n, pages) => {
                let mut skipped = Skipped::default();
                let (collected, _) =
                    bed.mm.collect(pages_at(n, pages), bed.mm.epoch(), Select::All, &mut skipped);
                if let Some(isolated) = collected.and_then(|collected| collected.isolate(&mut skipped)) {
                    isolated.stage(|slot| self.staged.push(slot));
                }
            }
            Op::WriteBack => {
                let slots = std::mem::take(&mut self.staged);
                let sent = bed.mm.write_back(&slots, &bed.pagemap, |slot| self.staged.push(slot));
                let all = sent.moved.get() + sent.raced.get() + sent.full.get() + sent.failed.get();
                assert_eq!(all, slots.len(), "{sent:?}");
            }
            Op::Exclusive(n, pages) => self.work_alone(n, pages),
            Op::EndLoans(n, pages) => {
                let (range, most) = (pages_at(n, pages), PageCount::new(pages / 2 + 1));
                let _ = bed.mm.end_loans(range, Select::All, most, |slot| self.staged.push(slot));
            }
            Op::Prefetch(n, pages) => {
                let _ = bed.program.prefetch(pages_at(n, pages));
            }
            Op::DontNeed(n, pages) => {
                bed.program.dontneed(pages_at(n, pages));
                self.forget(n, pages);
            }
            Op::Unmap(n, pages) => {
                bed.program.unmap(pages_at(n, pages));
                bed.host().map(pages_at(n, pages));
                self.forget(n, pages);
            }
            Op::Remap(n, pages) => {
                bed.program.unmap(pages_at(n + PAGES, pages));
                bed.program.remap(pages_at(n, pages), page_at(n + PAGES));
                bed.host().map(pages_at(n, pages));
                self.forget(n + PAGES, pages);
                for n in n..n + pages {
                    if let Some(value) = self.model.values.remove(&n) {
                        self.model.values.insert(n + PAGES, value);
                    }
                }
            }
            Op::HoldForDma(n, hold) => {
                bed.host().pin(page_at(n), hold);
            }
            Op::Pin(n, pages, pinned) => bed.mm.set_pinned(pages_at(n, pages), pinned),
            Op::Track(track) => bed.mm.set_tracking(track),
            Op::Trim => {
                let _ = bed.pagemap.trim(8);
            }
        }
    }

    fn work_alone(&mut self, n: usize, pages: usize) {
        let (bed, range) = (&self.bed, pages_at(n, pages));
        let mirror = bed.mm.mirror(range, Frames::default());
        let terms = Terms { since: bed.mm.epoch(), by: None };
        let (room, patience) = (&mut [Segment::UNUSED; 5], &mut Attempts::new(&bed.mm, 4));
        let done = bed.program.with_scratch(|scratch| {
            mirror.exclusive(range, &terms, room, scratch, patience, |frames, pages| {
                frames.0.extend(pages.iter().filter_map(|(page, view)| match view {
                    PageView::Exclusive { at } => Some((page, at)),
                    _ => None,
                }));
            })
        });
        let values = &mut self.model.values;
        let worked = mirror.look(|frames| {
            for (page, at) in &frames.0 {
                bed.host().store_frame(*at, bed.host().load_frame(*at) + 1);
                *values.entry(page.since(page_at(0)).get()).or_insert(0) += 1;
            }
            frames.0.len()
        });
        if let Ok(done) = done {
            assert_eq!(done.pages.get(), worked);
            assert_eq!(worked + done.skipped.total() as usize, pages, "{done:?}");
        }
    }

    fn forget(&mut self, n: usize, pages: usize) {
        (n..n + pages).for_each(|n| {
            self.model.values.remove(&n);
        });
    }

    fn fail(&self, n: u64, failure: Failure) {
        match failure {
            Failure::Host(stop) => self.bed.host().fail_nth(n, stop),
            Failure::Device(error) => self.bed.device.fail_nth(n, error),
            Failure::Other(error) => self.bed.other.fail_nth(n, error),
        }
    }

    fn is_failure_pending(&self) -> bool {
        self.bed.host().failure_pending()
            || self.bed.device.failure_pending()
            || self.bed.other.failure_pending()
    }

    /// Looks at every page with nothing failing any more. Returns how many were lost in all.
    fn finish(mut self) -> usize {
        self.fail(0, Failure::Host(Stop::Pending));
        self.fail(0, Failure::Device(TransferError::Gone));
        self.fail(0, Failure::Other(TransferError::Gone));
        (0..2 * PAGES).for_each(|n| self.load(n));
        self.bed.check_nothing_leaked();
        self.model.lost
    }
}

const FAILURES: [Failure; 10] = [
    Failure::Host(Stop::Pending),
    Failure::Host(Stop::NoMemory),
    Failure::Host(Stop::Busy),
    Failure::Host(Stop::Refused),
    Failure::Host(Stop::Errno(5)),
    Failure::Device(TransferError::Io(5)),
    Failure::Device(TransferError::Full),
    Failure::Device(TransferError::Short(17)),
    Failure::Other(TransferError::Io(5)),
    Failure::Other(TransferError::Declined),
];

fn script() -> Vec<Op> {
    let mut ops: Vec<Op> = (0..PAGES).map(|n| Op::Store(n, 1000 + n as u64)).collect();
    ops.extend([
        Op::HoldForDma(5, true),
        Op::DontNeed(10, 2),
        Op::Migrate(0, 16),
        Op::Load(3),
        Op::Load(4),
        Op::Store(7, 7),
        Op::Stage(16, 8),
        Op::Load(17),
        Op::Store(18, 18),
        Op::Pin(19, 1, true),
        Op::WriteBack,
        Op::Migrate(0, 24),
        Op::Prefetch(0, 8),
        Op::Track(false),
        Op::Load(12),
        Op::Track(true),
        Op::Migrate(24, 24),
        Op::Load(30),
        Op::DontNeed(31, 3),
        Op::Load(32),
        Op::Remap(24, 16),
        Op::Load(24 + PAGES),
        Op::Store(25 + PAGES, 25),
        Op::Migrate(24 + PAGES, 16),
        Op::Unmap(0, 6),
        Op::MigrateCold(0, 24),
        Op::Trim,
        Op::Load(40),
        Op::Migrate(0, 24),
        Op::Across(4, 16),
        Op::Load(8),
        Op::Store(9, 99),
        Op::Return(12, 4),
        Op::Holes(24, 16),
        Op::Store(26, 26),
        Op::Return(0, 40),
        Op::Load(27),
        Op::Migrate(0, 12),
        Op::Across(0, 12),
        Op::Load(0),
        Op::Load(6),
        Op::Return(1, 3),
        Op::Migrate(24, 12),
        Op::Load(30),
        Op::Evict { home: false },
        Op::Return(24, 12),
        Op::Stage(0, 8),
        Op::Evict { home: true },
        Op::Migrate(0, 12),
        Op::Exclusive(0, 20),
        Op::Store(3, 33),
        Op::Load(4),
        Op::Exclusive(2, 8),
        Op::Migrate(0, 24),
        Op::DontNeed(6, 2),
        Op::Remap(8, 2),
        Op::EndLoans(0, 12),
        Op::Load(2),
        Op::WriteBack,
        Op::Prefetch(10, 4),
        Op::Exclusive(0, 12),
        Op::Unmap(0, 1),
        Op::Holes(40, 8),
        Op::Across(16, 8),
        Op::Store(17, 17),
        Op::Recall(14, 8),
        Op::DontNeed(22, 1),
        Op::Migrate(12, 12),
    ]);
    ops
}

fn setup(can_move: bool) -> Setup {
    Setup { memory: 512, slots: 40, device: 96, window: (2, 16), track: true, can_move, ..Setup::default() }
}

#[test]
fn whichever_step_fails_nothing_is_lost() {
    let ways = [
        (true, false, MemoryType::Private),
        (false, true, MemoryType::Private),
        (true, true, MemoryType::Coherent),
    ];
    for (can_move, linked, other_type) in ways {
        for failure in FAILURES {
            let mut steps = 0;
            for n in 1.. {
                let mut script_run = Script::new(Setup { linked, other_type, ..setup(can_move) });
                script_run.fail(n, failure);
                script().into_iter().for_each(|op| script_run.run(op));
                let reached = !script_run.is_failure_pending();
                let lost = script_run.finish();
                assert_eq!(
                    lost, 0,
                    "one failure is always survived: step {n} {failure:?}, move {can_move}, {other_type:?}"
                );
                if !reached {
                    break;
                }
                steps = n;
            }
            assert!(steps > 5, "{failure:?} fired at {steps} steps only");
        }
    }
}

#[test]
fn a_device_that_reads_nothing_any_more_loses_only_what_it_has() {
    for can_move in [true, false] {
        let mut script_run = Script::new(setup(can_move));
        (0..PAGES).for_each(|n| script_run.run(Op::Store(n, 1000 + n as u64)));
        script_run.run(Op::Migrate(0, 16));
        script_run.run(Op::Stage(16, 16));
        script_run.bed.break_reads(Some(TransferError::Gone));
        (0..PAGES).for_each(|n| script_run.run(Op::Load(n)));
        assert_eq!(script_run.model.lost, 16);
        assert_eq!(script_run.finish(), 16);
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    let page = 0..PAGES;
    let span = (0..PAGES, 1..16usize).prop_map(|(n, pages)| (n, pages.min(PAGES - n)));
    prop_oneof![
        6 => (0..2 * PAGES, 1..1_000_000u64).prop_map(|(n, value)| Op::Store(n, value)),
        6 => (0..2 * PAGES).prop_map(Op::Load),
        6 => span.clone().prop_map(|(n, pages)| Op::Migrate(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::MigrateCold(n, pages)),
        3 => span.clone().prop_map(|(n, pages)| Op::Across(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::Return(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::Recall(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::Holes(n, pages)),
        4 => span.clone().prop_map(|(n, pages)| Op::Stage(n, pages)),
        3 => Just(Op::WriteBack),
        4 => span.clone().prop_map(|(n, pages)| Op::Exclusive(n, pages)),
        1 => span.clone().prop_map(|(n, pages)| Op::EndLoans(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::Prefetch(n, pages)),
        2 => span.clone().prop_map(|(n, pages)| Op::DontNeed(n, pages)),
        1 => span.clone().prop_map(|(n, pages)| Op::Unmap(n, pages)),
        1 => span.clone().prop_map(|(n, pages)| Op::Remap(n, pages)),
        2 => (page, any::<bool>()).prop_map(|(n, hold)| Op::HoldForDma(n, hold)),
        1 => (span, any::<bool>()).prop_map(|((n, pages), pinned)| Op::Pin(n, pages, pinned)),
        1 => any::<bool>().prop_map(|home| Op::Evict { home }),
        1 => any::<bool>().prop_map(Op::Track),
        1 => Just(Op::Trim),
    ]
}

fn any_step() -> impl Strategy<Value = (Op, Option<(u64, Failure)>)> {
    let failure = (1..5u64, prop::sample::select(FAILURES.to_vec()));
    (any_op(), prop::option::weighted(0.2, failure))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_scripts_agree_with_the_model(
        can_move in any::<bool>(),
        linked in any::<bool>(),
        coherent in any::<bool>(),
        window in 1..20usize,
        slots in 4..64usize,
        device in 8..128usize,
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        let window = (window.min(4), window);
        let other_type = if coherent { MemoryType::Coherent } else { MemoryType::Private };
        let mut script = Script::new(Setup { window, slots, device, linked, other_type, ..setup(can_move) });
        if device % 3 == 0 {
            script.bed.device.full_after(PageCount::new(device / 2));
        }
        let fails = |step: &(_, Option<(_, Failure)>)| {
            matches!(step, (_, Some((_, Failure::Device(_) | Failure::Other(_)))))
        };
        let device_fails = steps.iter().any(fails);
        for (op, failure) in steps {
            if let Some((n, failure)) = failure {
                script.fail(n, failure);
            }
            script.run(op);
        }
        // Two failures may meet in the two attempts at one page; then, and then only, something is lost.
        let lost = script.finish();
        prop_assert!(device_fails || lost == 0, "{lost} pages were lost by a device that never failed");
    }
}
