//! Where pages are.
//!
//! What    [`Residency`], the pages of a range by place.
//! Why     the words say which pages are away; of the others, only the kernel knows which were ever touched.
//! Races   a snapshot, taken with no lock held: a page that moves meanwhile may count at either place.
//! Fails   nothing fails. Where the kernel cannot be asked, pages count as absent.

use uhmm_addr::{PageCount, PfnRange, VaRange};
use uhmm_core::pagetable::State;

use crate::managed::Managed;

/// Where pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Residency {
    /// In RAM, where the program can touch them at once.
    pub resident: PageCount,
    /// In RAM, on their way out: a touch takes them back.
    pub staged: PageCount,
    /// On a device.
    pub device: PageCount,
    /// Of those on a device, the ones in the memory of a node ([`Space::add_memory`](super::Space::add_memory)).
    pub node: PageCount,
    /// In RAM, lent to a device, which alone may touch them: a touch of the program ends that.
    pub exclusive: PageCount,
    /// Of those on a device, the ones that the program can touch at once: a coherent device has them mapped in place.
    pub mapped: PageCount,
    /// Nowhere yet: never touched, or given up. They read as zeros.
    pub absent: PageCount,
    /// Lost by a device.
    pub poisoned: PageCount,
}

impl Managed {
    /// Where the pages of `range` are. A snapshot; pages may move while it is taken.
    pub fn residency(&self, range: VaRange) -> Residency {
        let mut found = Residency::default();
        let add = |count: &mut PageCount, pages| *count = count.plus(PageCount::new(pages));
        let mut away = 0;
        let nodes: Vec<PfnRange> = self.mm().pagemaps().added().map(|map| map.range()).collect();
        for part in self.mm().table().used(range) {
            for page in part.iter() {
                let word = self.mm().table().entry(page).load();
                let on_node = |pfn| nodes.iter().any(|node| node.contains(pfn));
                if matches!(word.state(), State::Device | State::Coherent) && word.pfn().is_some_and(on_node)
                {
                    add(&mut found.node, 1);
                }
                let count = match word.state() {
                    State::Empty | State::Resident => continue,
                    State::Staged | State::Moving => &mut found.staged,
                    State::Device => &mut found.device,
                    State::Exclusive => &mut found.exclusive,
                    State::Coherent => {
                        add(&mut found.mapped, 1);
                        &mut found.device
                    }
                    State::Poisoned => &mut found.poisoned,
                };
                add(count, 1);
                away += 1;
            }
        }
        found.resident = self.present(range).minus(found.mapped);
        found.absent = range.pages().minus(found.resident).minus(PageCount::new(away));
        found
    }

    /// Whether no page of `range` is on its way.
    pub fn is_settled(&self, range: VaRange) -> bool {
        let table = self.mm().table();
        table.away(range).all(|part| {
            let mut rest = Some(part);
            while let Some((page, word)) = rest.and_then(|rest| table.first_away(rest)) {
                if matches!(word.state(), State::Staged | State::Moving) {
                    return false;
                }
                rest = part.skip(page.since(part.first()).plus(PageCount::ONE));
            }
            true
        })
    }

    /// Pages of `range` that coherent devices have mapped in place.
    pub fn mapped_in_place(&self, range: VaRange) -> PageCount {
        if self.mm().pagemaps().iter().all(|map| map.memory().is_none()) {
            return PageCount::ZERO;
        }
        let words = self.mm().table().used(range).flat_map(|part| self.mm().table().words(part));
        PageCount::new(words.filter(|word| word.state() == State::Coherent).count())
    }

    /// Pages of `range` that are present.
    pub fn present(&self, range: VaRange) -> PageCount {
        let mut regions = [uhmm_sys::scan::Region::UNUSED; 32];
        let mut pages = PageCount::ZERO;
        let mut rest = Some(range);
        while let Some(part) = rest {
            let Ok(scanned) = self.mm().host().scanner().present(part, &mut regions) else { break };
            for region in &regions[..scanned.regions] {
                pages = pages.plus(region.range.pages());
            }
            let end = scanned.walk_end.page().max(part.first().forward(PageCount::ONE));
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        pages
    }
}
