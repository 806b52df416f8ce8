//! Random operations on the mechanisms, over a simulated host, against a plain model.

use std::collections::BTreeMap;

use uhmm_core::device::TransferError;
use uhmm_core::frame::Slot;
use uhmm_core::host::Stop;
use uhmm_core::migrate::Select;
use uhmm_core::stats::Skipped;
use uhmm_testdev::sim_host::{Bed, Killed, Setup, page_at, pages_at};

/// Pages that operations name; as many behind them are where mappings move to.
const PAGES: usize = 48;
/// Operations of one input.
const MOST: usize = 96;

/// Three bytes of setup, then three for each operation: which, where, how much.
///
/// The program reads what it wrote, or gets SIGBUS where the device could not give a page back; nothing is lost
/// while the device does not fail; and in the end nothing is in use.
pub fn run(data: &[u8]) {
    let Some((&[flags, slots, device], rest)) = data.split_first_chunk::<3>() else { return };
    let window = 1 + usize::from(flags >> 2 & 15);
    let bed = Bed::new(Setup {
        memory: 512,
        slots: 4 + usize::from(slots % 60),
        device: 8 + usize::from(device % 120),
        window: (window.min(4), window),
        track: flags & 1 != 0,
        can_move: flags & 2 != 0,
        ..Setup::default()
    });
    let mut script = Script { bed, values: BTreeMap::new(), staged: Vec::new(), device_failed: false };
    for operation in rest.as_chunks::<3>().0.iter().take(MOST) {
        script.step(*operation);
    }
    script.finish();
}

struct Script {
    bed: Bed,
    /// What pages hold that are not zeros.
    values: BTreeMap<usize, u64>,
    staged: Vec<Slot>,
    device_failed: bool,
}

impl Script {
    fn step(&mut self, [which, place, amount]: [u8; 3]) {
        let anywhere = usize::from(place) % (2 * PAGES);
        let n = usize::from(place) % PAGES;
        let pages = (1 + usize::from(amount) % 15).min(PAGES - n);
        let range = pages_at(n, pages);
        let bed = &self.bed;
        match which % 20 {
            0..=2 => self.store(anywhere, 1 + u64::from(amount)),
            3..=5 => self.load(anywhere),
            6 | 7 => {
                let done = bed.mm.migrate(range, bed.mm.epoch(), &bed.pagemap, Select::All);
                let all = done.moved.get() + done.skipped.total() as usize;
                assert_eq!(all, pages, "every page has moved or has a reason: {done:?}");
            }
            8 => {
                let _ = bed.mm.migrate(
                    range,
                    bed.mm.epoch(),
                    &bed.pagemap,
                    Select::Cold { lap: u32::from(amount) },
                );
            }
            9 => {
                let mut skipped = Skipped::default();
                let (collected, _) = bed.mm.collect(range, bed.mm.epoch(), Select::All, &mut skipped);
                if let Some(isolated) = collected.and_then(|collected| collected.isolate(&mut skipped)) {
                    isolated.stage(|slot| self.staged.push(slot));
                }
            }
            10 => {
                let slots = std::mem::take(&mut self.staged);
                let _ = bed.mm.write_back(&slots, &bed.pagemap, |slot| self.staged.push(slot));
            }
            11 => {
                let _ = bed.program.prefetch(range);
            }
            12 => {
                bed.program.dontneed(range);
                self.forget(n, pages);
            }
            13 => {
                bed.program.unmap(range);
                bed.host().map(range);
                self.forget(n, pages);
            }
            14 => {
                bed.program.unmap(pages_at(n + PAGES, pages));
                bed.program.remap(range, page_at(n + PAGES));
                bed.host().map(range);
                self.forget(n + PAGES, pages);
                for n in n..n + pages {
                    if let Some(value) = self.values.remove(&n) {
                        self.values.insert(n + PAGES, value);
                    }
                }
            }
            15 => {
                bed.host().pin(page_at(n), amount & 1 != 0);
            }
            16 => bed.mm.set_pinned(range, amount & 1 != 0),
            17 => {
                let _ = bed.pagemap.trim(8);
            }
            18 => {
                let stops = [Stop::Pending, Stop::NoMemory, Stop::Busy, Stop::Refused, Stop::Errno(5)];
                bed.host().fail_nth(1 + u64::from(place % 4), stops[usize::from(amount) % stops.len()]);
            }
            _ => {
                let errors = [TransferError::Io(5), TransferError::Full, TransferError::Short(17)];
                bed.device.fail_nth(1 + u64::from(place % 4), errors[usize::from(amount) % errors.len()]);
                self.device_failed = true;
            }
        }
    }

    fn load(&mut self, n: usize) {
        match self.bed.program.load(page_at(n)) {
            Ok(value) => {
                let expected = self.values.get(&n).copied().unwrap_or(0);
                assert_eq!(value, expected, "page {n}, {:?}", self.bed.word(n));
            }
            Err(killed) => self.lost(n, killed),
        }
    }

    fn store(&mut self, n: usize, value: u64) {
        match self.bed.program.store(page_at(n), value) {
            Ok(()) => {
                self.values.insert(n, value);
            }
            Err(killed) => self.lost(n, killed),
        }
    }

    fn lost(&mut self, n: usize, killed: Killed) {
        assert_eq!(killed, Killed::Bus, "page {n}, {:?}", self.bed.word(n));
        assert!(self.device_failed, "page {n} was lost by a device that never failed");
        self.bed.program.dontneed(pages_at(n, 1));
        self.values.remove(&n);
    }

    fn forget(&mut self, n: usize, pages: usize) {
        (n..n + pages).for_each(|n| {
            self.values.remove(&n);
        });
    }

    fn finish(mut self) {
        self.bed.host().fail_nth(0, Stop::Complete);
        self.bed.device.fail_nth(0, TransferError::Gone);
        (0..2 * PAGES).for_each(|n| self.load(n));
        self.bed.check_nothing_leaked();
    }
}

/// A few lives of a page.
pub fn seeds() -> Vec<Vec<u8>> {
    let out_and_home: &[u8] = &[7, 40, 96, 0, 3, 9, 6, 0, 15, 3, 3, 0, 6, 0, 15, 0, 3, 1, 3, 3, 0];
    let staged: &[u8] = &[3, 40, 96, 0, 1, 9, 0, 2, 9, 9, 0, 7, 3, 1, 0, 10, 0, 0, 3, 2, 0];
    let moved_away: &[u8] = &[1, 4, 8, 0, 5, 5, 6, 5, 3, 14, 5, 3, 3, 53, 0, 12, 5, 3, 17, 0, 0];
    let failing: &[u8] = &[15, 40, 96, 0, 1, 9, 18, 0, 0, 6, 0, 7, 19, 0, 0, 3, 1, 0, 16, 1, 1, 6, 0, 7];
    [out_and_home, staged, moved_away, failing].map(<[u8]>::to_vec).to_vec()
}
