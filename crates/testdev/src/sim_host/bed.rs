//! Everything that a scenario needs, put together.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange, VaRange, Vpn};
use uhmm_core::device::{Device, MemoryType, TransferError};
use uhmm_core::fault::window::Windows;
use uhmm_core::frame::Arena;
use uhmm_core::migrate::{Migrated, Select, Sources};
use uhmm_core::mm::{Mm, Parts};
use uhmm_core::notifier::Owner;
use uhmm_core::pagemap::{Pagemap, PagemapSet, Registry};
use uhmm_core::pagetable::{PageTable, PageWord};
use uhmm_core::sync::{AtomicU32, Park};

use super::{Program, SimHost, deliver};
use crate::fake_device::{FakeAccess, FakeDevice};

/// The first page of a bed's memory.
const FIRST: usize = 64 * CHUNK_PAGES;

/// The `n`-th page of a bed's memory.
pub const fn page_at(n: usize) -> Vpn {
    Vpn::new(FIRST + n)
}

/// `pages` pages of a bed's memory from the `n`-th on.
///
/// # Panics
/// If that is none.
pub fn pages_at(n: usize, pages: usize) -> VaRange {
    VaRange::of_pages(page_at(n), PageCount::new(pages)).expect("at least one page")
}

/// How large a bed is, and what it can do.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Pages that have words; all of them are mapped.
    pub memory: usize,
    /// 4 KiB arena slots.
    pub slots: usize,
    /// 2 MiB arena slots.
    pub huge_slots: usize,
    /// Pages of the device.
    pub device: usize,
    /// Pages that a random fault brings home, and the most that a sequence does.
    pub window: (usize, usize),
    /// Whether pages keep their copies until they are written.
    pub track: bool,
    /// Whether frames can change places.
    pub can_move: bool,
    /// Pages of the other device.
    pub other: usize,
    /// How the CPU sees the other device.
    pub other_type: MemoryType,
    /// Whether the two devices reach each other.
    pub linked: bool,
    /// Whether the two devices have one owner.
    pub shared_owner: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            memory: 2 * CHUNK_PAGES,
            slots: 128,
            huge_slots: 0,
            device: 1024,
            window: (1, 1),
            track: false,
            can_move: true,
            other: 128,
            other_type: MemoryType::Private,
            linked: false,
            shared_owner: false,
        }
    }
}

impl Setup {
    /// Plays `scenario` with both ways of taking pages out: frames that change places, and copies.
    pub fn both_ways(scenario: impl Fn(Self)) {
        for can_move in [true, false] {
            scenario(Self { can_move, ..Self::default() });
        }
    }
}

/// An address space over a simulated host and two fake devices.
pub struct Bed {
    /// The address space.
    pub mm: Arc<Mm<SimHost>>,
    /// A thread of the program.
    pub program: Program,
    /// Where the pagemaps of both devices are registered.
    pub registry: Registry,
    /// The device.
    pub device: Arc<FakeDevice>,
    /// Its pagemap.
    pub pagemap: Arc<Pagemap>,
    /// The other device.
    pub other: Arc<FakeDevice>,
    /// Its pagemap.
    pub other_map: Arc<Pagemap>,
    reads: Arc<Mutex<Reads>>,
    setup: Setup,
}

/// Waits by looking again.
struct Nap;

impl Park for Nap {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        std::thread::yield_now();
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

impl Bed {
    /// A bed as `setup` says, all its memory mapped and absent.
    pub fn new(setup: Setup) -> Self {
        let other = FakeDevice::new(PageCount::new(setup.other));
        let other = Arc::new(other.with_memory_type(setup.other_type).with_link(setup.linked));
        let host = SimHost::new(PageCount::new(setup.huge_slots * CHUNK_PAGES + setup.slots));
        let host = host.with_device((setup.other_type == MemoryType::Coherent).then(|| other.bytes()));
        if !setup.can_move {
            host.forbid_move();
        }
        host.map(pages_at(0, setup.memory));
        let huge_pages = PageCount::new(setup.huge_slots * CHUNK_PAGES);
        let huge = VaRange::of_pages(host.arena().first(), huge_pages);
        let slots = host.arena().skip(huge_pages).expect("a bed has 4 KiB slots");
        let reads = Arc::new(Mutex::new(Reads::default()));
        let device = device(PageCount::new(setup.device), reads.clone(), setup.linked);
        let registry = Registry::new(Arc::new(Nap));
        let register = |start: u64, device: Arc<FakeDevice>| {
            let range = PfnRange::new(Pfn::new(start), device.capacity());
            let builder = Pagemap::builder(device.name(), device.memory_type()).range(range).device(device);
            let builder = if setup.shared_owner { builder.owner(Owner(1)) } else { builder };
            registry.register(builder).expect("two ranges apart")
        };
        let pagemap = register(1 << 20, device.clone());
        let other_map = register(1 << 30, other.clone());
        let mm = Arc::new(Mm::new(Parts {
            table: PageTable::owned(page_at(0), PageCount::new(setup.memory)),
            pagemaps: PagemapSet::new([pagemap.clone(), other_map.clone()]),
            arena: Arena::new(slots, Geometry::K4),
            huge: huge.map(|range| Arena::new(range, Geometry::M2)),
            windows: Windows::new(PageCount::new(setup.window.0), PageCount::new(setup.window.1)),
            track: setup.track,
            stats: None,
            host,
        }));
        let reader: Weak<Mm<SimHost>> = Arc::downgrade(&mm);
        mm.host().set_reader(move || {
            if let Some(mm) = reader.upgrade() {
                deliver(&mm);
            }
        });
        Self {
            program: Program::new(mm.clone()),
            mm,
            registry,
            device,
            pagemap,
            other,
            other_map,
            reads,
            setup,
        }
    }

    /// Makes every read of the device fail, or lets reads succeed again.
    pub fn break_reads(&self, error: Option<TransferError>) {
        lock(&self.reads).broken = error;
    }

    /// Calls `hook` in the middle of the next read of the device, from which other threads may be played.
    pub fn during_next_read(&self, hook: impl FnOnce(&Arc<Mm<SimHost>>) + Send + 'static) {
        let mm = self.mm.clone();
        lock(&self.reads).hook = Some(Box::new(move || hook(&mm)));
    }

    /// The host.
    pub fn host(&self) -> &SimHost {
        self.mm.host()
    }

    /// All the memory.
    pub fn memory(&self) -> VaRange {
        pages_at(0, self.setup.memory)
    }

    /// The word of the `n`-th page.
    pub fn word(&self, n: usize) -> PageWord {
        self.mm.table().entry(page_at(n)).load()
    }

    /// Stores `100 + n` to each of these pages, by the program.
    pub fn fill(&self, first: usize, pages: usize) {
        for n in first..first + pages {
            assert_eq!(self.program.store(page_at(n), 100 + n as u64), Ok(()));
        }
    }

    /// Moves pages out.
    pub fn migrate(&self, first: usize, pages: usize) -> Migrated {
        self.mm.migrate(pages_at(first, pages), self.mm.epoch(), &self.pagemap, Select::All)
    }

    /// Moves the pages that `sources` says to `to`.
    pub fn migrate_from(&self, first: usize, pages: usize, to: &Arc<Pagemap>, sources: &Sources) -> Migrated {
        let range = pages_at(first, pages);
        let done = self
            .program
            .with_scratch(|scratch| self.mm.migrate_from(range, self.mm.epoch(), to, sources, scratch));
        assert_eq!(done.moved.get() + done.skipped.total() as usize, pages, "{done:?}");
        done
    }

    /// Moves pages of the first device to the other one.
    pub fn migrate_across(&self, first: usize, pages: usize) -> Migrated {
        let sources = Sources { private: Some(self.pagemap.owner()), ..Sources::NONE };
        self.migrate_from(first, pages, &self.other_map, &sources)
    }

    /// Empties the first device: its pages go home, or to the other one.
    pub fn evict(&self, to: Option<&Arc<Pagemap>>) -> Migrated {
        self.evict_pfns(self.pagemap.range(), to)
    }

    /// Gives up these device pages.
    pub fn evict_pfns(&self, pages: PfnRange, to: Option<&Arc<Pagemap>>) -> Migrated {
        self.program.with_scratch(|scratch| self.mm.evict_pfns(self.memory(), pages, to, scratch))
    }

    /// Asserts that these pages say what [`Bed::fill`] wrote.
    pub fn check(&self, first: usize, pages: usize) {
        for n in first..first + pages {
            assert_eq!(self.program.load(page_at(n)), Ok(100 + n as u64), "page {n}");
        }
    }

    /// Unmaps everything, and asserts that no device page, slot or frame is left in use.
    pub fn check_nothing_leaked(self) {
        self.host().fail_nth(0, uhmm_core::host::Stop::Complete);
        self.program.unmap(self.memory());
        assert_eq!(self.pagemap.live(), PageCount::ZERO, "device pages are in use");
        assert_eq!(self.other_map.live(), PageCount::ZERO, "pages of the other device are in use");
        let mut frames = 0;
        for arena in [Some(self.mm.arena()), self.mm.huge_arena()].into_iter().flatten() {
            let (framed, empty) = (arena.free_frames(self.host()), arena.free_slots(self.host()));
            assert_eq!(framed.plus(empty), arena.range().pages(), "slots are in use");
            frames += framed.get();
        }
        assert_eq!(frames, self.host().frames(), "the pool is wrong about which slots have frames");
        for page in self.memory().iter() {
            assert_eq!(self.mm.table().entry(page).load(), PageWord::EMPTY, "{page:?} has a word");
        }
    }
}

/// What happens to reads of the device.
#[derive(Default)]
struct Reads {
    broken: Option<TransferError>,
    hook: Option<Box<dyn FnOnce() + Send>>,
}

fn lock(reads: &Mutex<Reads>) -> std::sync::MutexGuard<'_, Reads> {
    reads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device whose reads do as `reads` says.
fn device(pages: PageCount, reads: Arc<Mutex<Reads>>, linked: bool) -> Arc<FakeDevice> {
    Arc::new_cyclic(|device: &Weak<FakeDevice>| {
        let device = device.clone();
        FakeDevice::new(pages).with_link(linked).on_transfer(move |access, _, _| {
            if access == FakeAccess::Write {
                return;
            }
            let (broken, hook) = {
                let mut reads = lock(&reads);
                (reads.broken, reads.hook.take())
            };
            if let Some(hook) = hook {
                hook();
            }
            if let (Some(error), Some(device)) = (broken, device.upgrade()) {
                device.fail_nth(1, error);
            }
        })
    })
}
