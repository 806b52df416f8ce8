//! Scenarios of pages that a device reaches by addresses of its own, on the simulated host: nothing moves that is
//! mapped, and nothing is mapped that moved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use uhmm_addr::{CHUNK_PAGES, DmaAddr, PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::dma::{DmaError, DmaTable, Identity, Iommu, IommuError};
use uhmm_core::mirror::{Mirror, RangeFaultError, Segment};
use uhmm_core::mm::Mm;
use uhmm_core::notifier::{Change, Event};
use uhmm_testdev::sim_host::{Attempts, Bed, Setup, SimHost, deliver, page_at, pages_at};

/// As VFIO: pages are pinned while they are mapped, runs are unmapped as they were mapped, and there is a limit.
#[derive(Clone)]
struct Shared(Arc<Mutex<State>>);

struct State {
    mm: Arc<Mm<SimHost>>,
    runs: BTreeMap<Vpn, (PageCount, bool)>,
    limit: usize,
    most: usize,
}

const WINDOW: u64 = 0x4000_0000;

impl Shared {
    fn new(bed: &Bed, limit: usize) -> Self {
        let mm = bed.mm.clone();
        Self(Arc::new(Mutex::new(State { mm, runs: BTreeMap::new(), limit, most: 0 })))
    }

    fn runs(&self) -> Vec<(Vpn, usize, bool)> {
        let state = self.0.lock().unwrap();
        state.runs.iter().map(|(first, (pages, write))| (*first, pages.get(), *write)).collect()
    }
}

impl Iommu for Shared {
    fn map(&mut self, pages: VaRange, write: bool) -> Result<DmaAddr, IommuError> {
        let mut state = self.0.lock().unwrap();
        if state.runs.len() == state.limit {
            return Err(IommuError::Full);
        }
        for page in pages.iter() {
            assert!(state.mm.host().pin(page, true), "{page:?} is mapped and not there");
        }
        assert!(state.runs.insert(pages.first(), (pages.pages(), write)).is_none());
        state.most = state.most.max(state.runs.len());
        Ok(DmaAddr::new(WINDOW).forward(pages.first().since(page_at(0))))
    }

    fn unmap(&mut self, pages: VaRange) {
        let mut state = self.0.lock().unwrap();
        let run = state.runs.remove(&pages.first());
        assert_eq!(run.map(|(len, _)| len), Some(pages.pages()), "in part, or not at all");
        for page in pages.iter() {
            let _ = state.mm.host().pin(page, false);
        }
    }
}

type DmaMirror<'m, I> = Mirror<'m, SimHost, DmaTable<I>>;

fn map<I: Iommu>(
    bed: &Bed,
    mirror: &DmaMirror<'_, I>,
    first: usize,
    pages: usize,
    write: bool,
) -> Result<(), DmaError> {
    let mut room = [Segment::UNUSED; CHUNK_PAGES];
    let (range, patience) = (pages_at(first, pages), &mut Attempts::new(&bed.mm, 10));
    bed.program.with_scratch(|scratch| mirror.dma_map(range, write, &mut room, scratch, patience))
}

fn address<I: Iommu>(mirror: &DmaMirror<'_, I>, n: usize, write: bool) -> Option<DmaAddr> {
    let addr = VirtAddr::new(page_at(n).base().get() + 24);
    mirror.look(|table| table.address(addr, write))
}

fn at(n: usize) -> DmaAddr {
    DmaAddr::new(WINDOW).offset(4096 * n + 24)
}

#[test]
fn what_is_mapped_is_unmapped_before_it_moves() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 32);
        assert_eq!(bed.migrate(8, 8).moved.get(), 8);
        let iommu = Shared::new(&bed, 100);
        let mirror = bed.mm.dma_mirror(pages_at(0, 32), iommu.clone());
        assert_eq!(map(&bed, &mirror, 0, 32, true), Ok(()));
        assert_eq!(iommu.runs(), [(page_at(0), 32, true)], "brought home, and one run");
        assert_eq!((address(&mirror, 9, true), address(&mirror, 31, false)), (Some(at(9)), Some(at(31))));
        // Pinned by the IOMMU, and moved all the same, as it lets go first: of the run as a whole.
        assert_eq!(bed.migrate(4, 4).moved.get(), 4);
        assert_eq!(iommu.runs(), []);
        assert_eq!(mirror.look(DmaTable::mapped), PageCount::ZERO);
        assert_eq!((address(&mirror, 4, false), address(&mirror, 9, false)), (None, None));
        assert_eq!(map(&bed, &mirror, 16, 16, true), Ok(()));
        assert_eq!(bed.migrate(0, 16).moved.get(), 12, "what is mapped beside it does not matter");
        assert_eq!(iommu.runs(), [(page_at(16), 16, true)]);
        drop(mirror);
        assert_eq!(iommu.runs(), [], "with the mirror the mappings end");
        assert_eq!(bed.migrate(16, 16).moved.get(), 16);
        bed.check(0, 32);
        drop(iommu);
        bed.check_nothing_leaked();
    });
}

#[test]
fn what_is_mapped_already_stays_mapped() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 32);
    let iommu = Shared::new(&bed, 100);
    let mirror = bed.mm.dma_mirror(pages_at(0, 32), iommu.clone());
    assert_eq!(map(&bed, &mirror, 4, 4, false), Ok(()));
    assert_eq!((address(&mirror, 4, false), address(&mirror, 4, true)), (Some(at(4)), None));
    assert_eq!(map(&bed, &mirror, 0, 16, false), Ok(()));
    let around = [(page_at(0), 4, false), (page_at(4), 4, false), (page_at(8), 8, false)];
    assert_eq!(iommu.runs(), around);
    // For writing it is mapped anew: runs as a whole, and of them what was asked for.
    assert_eq!(map(&bed, &mirror, 6, 4, true), Ok(()));
    assert_eq!(iommu.runs(), [(page_at(0), 4, false), (page_at(6), 4, true)]);
    assert_eq!(map(&bed, &mirror, 0, 16, false), Ok(()));
    let pages = mirror.look(DmaTable::mapped).get();
    assert_eq!((pages, address(&mirror, 6, true), address(&mirror, 5, true)), (16, Some(at(6)), None));
    assert_eq!(mirror.dma_unmap(pages_at(9, 1)).get(), 4);
    assert_eq!(mirror.dma_unmap(pages_at(9, 1)).get(), 0);
    assert_eq!(mirror.dma_unmap(pages_at(0, 32)).get(), 12);
    assert_eq!(iommu.runs(), []);
    drop((mirror, iommu));
    bed.check(0, 32);
    bed.check_nothing_leaked();
}

#[test]
fn an_iommu_that_is_full_keeps_what_it_has() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    let iommu = Shared::new(&bed, 2);
    let mirror = bed.mm.dma_mirror(pages_at(0, 16), iommu.clone());
    assert_eq!(map(&bed, &mirror, 2, 2, true), Ok(()));
    // Two runs are wanting, before and behind.
    let full = DmaError::Iommu(page_at(4).base(), IommuError::Full);
    assert_eq!(map(&bed, &mirror, 0, 8, true), Err(full));
    assert_eq!(iommu.runs(), [(page_at(0), 2, true), (page_at(2), 2, true)]);
    assert_eq!(mirror.dma_unmap(pages_at(0, 16)).get(), 4);
    assert_eq!(map(&bed, &mirror, 0, 8, true), Ok(()));
    assert_eq!(iommu.runs(), [(page_at(0), 8, true)]);
    drop((mirror, iommu));
    bed.check_nothing_leaked();
}

#[test]
fn every_change_takes_mappings_back() {
    type Step = fn(&Bed);
    let changes: [(&str, Step); 5] = [
        ("unmap", |bed| bed.program.unmap(pages_at(4, 4))),
        ("dontneed", |bed| bed.program.dontneed(pages_at(4, 4))),
        ("remap", |bed| bed.program.remap(pages_at(4, 4), page_at(64))),
        ("protect", |bed| {
            let change = Change::new(pages_at(4, 4), Event::Protect);
            drop(bed.mm.notifiers().begin(bed.host(), &change).expect("it may block"));
        }),
        ("close", |bed| bed.mm.close()),
    ];
    for (name, change) in changes {
        let bed = Bed::new(Setup::default());
        bed.fill(0, 16);
        let iommu = Shared::new(&bed, 100);
        let mirror = bed.mm.dma_mirror(pages_at(0, 16), iommu.clone());
        for first in [0, 4, 8] {
            assert_eq!(map(&bed, &mirror, first, 4, true), Ok(()));
        }
        change(&bed);
        deliver(&bed.mm);
        let left: Vec<Vpn> = iommu.runs().iter().map(|run| run.0).collect();
        let kept = if name == "close" { vec![] } else { vec![page_at(0), page_at(8)] };
        assert_eq!(left, kept, "{name}");
        drop(mirror);
        assert_eq!(iommu.runs(), [], "{name}");
    }
}

#[test]
fn what_cannot_be_had_is_not_mapped() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    let mirror = bed.mm.dma_mirror(pages_at(0, 16), Identity);
    bed.host().set_read_only(pages_at(8, 1), true);
    let forbidden = DmaError::Pages(RangeFaultError::Permission(page_at(8).base()));
    assert_eq!(map(&bed, &mirror, 0, 16, true), Err(forbidden));
    assert_eq!(mirror.look(DmaTable::mapped), PageCount::ZERO);
    assert_eq!(map(&bed, &mirror, 0, 16, false), Ok(()));
    let here = VirtAddr::new(page_at(8).base().get() + 24);
    assert_eq!(address(&mirror, 8, false), Some(DmaAddr::new(here.get() as u64)), "its own address");
    let outside = DmaError::Pages(RangeFaultError::Outside(pages_at(12, 8)));
    assert_eq!(map(&bed, &mirror, 12, 8, false), Err(outside));
    assert_eq!(mirror.look(|table| table.address(page_at(16).base(), false)), None);
    drop(mirror);
    bed.check_nothing_leaked();
}
