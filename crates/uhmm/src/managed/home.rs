//! Bringing all of it home, and knowing that it is.

use uhmm_addr::{VaRange, Vpn};
use uhmm_core::fault::Scratch;
use uhmm_core::pagetable::State;

use super::Managed;

impl Managed {
    /// Brings every page of the managed ranges home.
    pub fn bring_home(&self, scratch: &mut Scratch) {
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.range_from(at) {
            self.bring_range_home(range, scratch);
            at = range.end_page();
        }
    }

    /// Brings every page of `range` home, those of coherent devices as well.
    pub fn bring_range_home(&self, range: VaRange, scratch: &mut Scratch) {
        while self.is_away(range) {
            self.mm.leave_coherent(range, scratch);
            // Whoever moves a page now is done with it soon.
            if self.mm.prefetch(range, scratch).is_zero() {
                std::thread::yield_now();
            }
        }
    }

    /// Whether some page of the managed ranges is neither at home nor lost.
    pub fn is_any_away(&self) -> bool {
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.range_from(at) {
            if self.is_away(range) {
                return true;
            }
            at = range.end_page();
        }
        false
    }

    /// Whether some page of `range` is neither at home nor lost.
    pub fn is_away(&self, range: VaRange) -> bool {
        let mut pages = self.mm.table().used(range).flat_map(VaRange::iter);
        pages.any(|page| {
            let state = self.mm.table().entry(page).load().state();
            !matches!(state, State::Empty | State::Resident | State::Poisoned)
        })
    }
}
