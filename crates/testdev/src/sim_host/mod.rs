//! An operating system that does what a test tells it.
//!
//! What     [`SimHost`], an address space in plain RAM behind the port [`Host`]; [`Program`], which touches it
//!          and lets faults be resolved; [`Bed`], one of each with a device, ready for a test.
//! Why      "what if exactly this call fails, and an event waits just now" can be asked of every call.
//! Owns     the arena, which is real memory, since devices copy from and to it, as is a coherent device's memory, where
//!          what was moved away leaves garbage behind; the program's addresses are numbers.
//! Locks    one, inside every call; never while an event is delivered.
//! Fails    when told to ([`SimHost::fail_nth`]), with nothing done; and as the kernel does: for pages that are
//!          there already, holes, pinned pages, read-only mappings, and while an event waits to be read.

mod bed;
pub(crate) mod memory;
mod mirrored;
mod program;
mod state;

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::host::{Host, Install, Progress, Rights, Sort, Stop, Unusual};
use uhmm_core::sync::{AtomicU32, Ordering, Park};

pub use bed::{Bed, Setup, page_at, pages_at};
pub use mirrored::{Attempts, Table};
pub use program::{Killed, Program, deliver};
pub use state::{Event, Trap};

use memory::Memory;
use state::{Area, Page, Slots, State, is_chunk, page_of, value_of};

type Reader = Box<dyn Fn() + Send + Sync>;
type Hook = Box<dyn FnOnce() + Send>;

/// The simulated host.
pub struct SimHost {
    arena: Memory,
    /// The memory of a coherent device.
    device: Option<Arc<Memory>>,
    state: Mutex<State>,
    reader: OnceLock<Reader>,
    after_copy_out: Mutex<Option<Hook>>,
    parked: (Mutex<()>, Condvar),
    looks: AtomicU64,
    deaf: AtomicBool,
}

impl fmt::Debug for SimHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimHost").field("state", &*self.lock()).finish_non_exhaustive()
    }
}

impl SimHost {
    /// A host with an arena of `arena` pages without frames, and nothing mapped.
    pub fn new(arena: PageCount) -> Self {
        Self {
            arena: Memory::new(arena),
            device: None,
            state: Mutex::default(),
            reader: OnceLock::new(),
            after_copy_out: Mutex::new(None),
            parked: (Mutex::default(), Condvar::new()),
            looks: AtomicU64::new(0),
            deaf: AtomicBool::new(false),
        }
    }

    /// The same, with the memory of a coherent device, in which there is no frame.
    pub(crate) fn with_device(self, device: Option<Arc<Memory>>) -> Self {
        Self { device, ..self }
    }

    /// The memory in which `address` lies, and which of the two it is.
    fn slots_at(&self, address: VirtAddr) -> (&Memory, Slots) {
        match &self.device {
            Some(device) if device.range().contains(address.page()) => (device, Slots::Device),
            _ => (&self.arena, Slots::Arena),
        }
    }

    /// Whether the page of a coherent device's memory has a frame; `None` for any other page.
    fn is_backed(&self, state: &State, page: Vpn) -> Option<bool> {
        let device = self.device.as_ref().filter(|device| device.range().contains(page))?;
        Some(state.slots(Slots::Device).contains(&device.index(page.base())))
    }

    /// Frames in the memory of the coherent device.
    pub fn device_frames(&self) -> usize {
        self.lock().slots(Slots::Device).len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the arena's slots lie.
    pub fn arena(&self) -> VaRange {
        self.arena.range()
    }

    /// Arena slots that have a frame.
    pub fn frames(&self) -> usize {
        self.lock().framed.len()
    }

    // --- what a test tells it ---------------------------------------------------------------------------

    /// From now on the `n`-th call (1 is the next one) does nothing and stops with `stop`, once.
    pub fn fail_nth(&self, n: u64, stop: Stop) {
        self.lock().plan.fail = (n > 0).then_some((n, stop));
    }

    /// Whether a failure asked for with [`SimHost::fail_nth`] is still to come.
    pub fn failure_pending(&self) -> bool {
        self.lock().plan.fail.is_some()
    }

    /// Calls so far that could have failed.
    pub fn calls(&self) -> u64 {
        self.lock().plan.calls
    }

    /// Pages that were copied into the arena so far, because their frames could not move there.
    pub fn copied_out(&self) -> PageCount {
        PageCount::new(self.lock().copied_out)
    }

    /// Frames cannot change places from now on: the kernel is an old one.
    pub fn forbid_move(&self) {
        self.lock().plan.no_move = true;
    }

    /// Pins a present page for DMA, or shares it with a child: nobody can move it. `false` if it is absent.
    pub fn pin(&self, page: Vpn, pinned: bool) -> bool {
        self.lock().pages.get_mut(&page).map(|page| page.pinned = pinned).is_some()
    }

    /// Makes `chunk` one huge page of present pages with the values `value(n)`.
    pub fn fill_huge(&self, chunk: VaRange, value: impl Fn(usize) -> u64) {
        assert!(is_chunk(chunk));
        let mut state = self.lock();
        for (n, page) in chunk.iter().enumerate() {
            state.pages.insert(page, Page::of(page_of(value(n))));
        }
        state.huge.insert(chunk.first().chunk());
    }

    /// Who reads events while a call of ours waits for it; to be set once.
    pub fn set_reader(&self, reader: impl Fn() + Send + Sync + 'static) {
        assert!(self.reader.set(Box::new(reader)).is_ok(), "the reader is set once");
    }

    /// Calls `hook` when pages have been copied out the next time, before they are discarded.
    pub fn after_next_copy_out(&self, hook: impl FnOnce() + Send + 'static) {
        *self.after_copy_out.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    // --- what a device does with frames that are its own ------------------------------------------------

    /// The value of the frame at `slot`.
    ///
    /// # Panics
    /// If there is no frame, or if it is torn.
    pub fn load_frame(&self, slot: VirtAddr) -> u64 {
        let state = self.lock();
        let index = self.arena.index(slot);
        assert!(state.framed.contains(&index), "{slot} has no frame");
        value_of(&self.arena.read(index))
    }

    /// Makes the frame at `slot` say `value`.
    ///
    /// # Panics
    /// If there is no frame.
    pub fn store_frame(&self, slot: VirtAddr, value: u64) {
        let state = self.lock();
        let index = self.arena.index(slot);
        assert!(state.framed.contains(&index), "{slot} has no frame");
        self.arena.write(index, &page_of(value));
    }

    // --- what the program does --------------------------------------------------------------------------

    /// Maps `range`, which becomes a mapping of its own even beside another one.
    pub fn map(&self, range: VaRange) {
        self.map_as(Area { range, read_only: false, locked: false });
    }

    fn map_as(&self, area: Area) {
        let mut state = self.lock();
        state.cut(area.range);
        state.areas.push(area);
    }

    /// Forbids or permits writes to the mapping of `range`.
    pub fn set_read_only(&self, range: VaRange, read_only: bool) {
        self.map_as(Area { range, read_only, locked: false });
    }

    /// Makes `range` a mapping of its own that is locked in memory: it cannot be discarded.
    pub fn lock_in_memory(&self, range: VaRange) {
        self.map_as(Area { range, read_only: false, locked: true });
    }

    /// Whether a page is there.
    pub fn is_present(&self, page: Vpn) -> bool {
        self.lock().pages.contains_key(&page)
    }

    /// Whether a present page is write-protected.
    pub fn is_protected(&self, page: Vpn) -> bool {
        self.lock().pages.get(&page).is_some_and(|page| page.protected)
    }

    /// One load: the value of the page, or what the touch meets.
    pub fn load(&self, page: Vpn) -> Result<u64, Trap> {
        let state = self.lock();
        state.touch(page, false)?;
        Ok(value_of(&state.pages[&page].bytes))
    }

    /// One store that makes the whole page say `value`, or what the touch meets.
    pub fn store(&self, page: Vpn, value: u64) -> Result<(), Trap> {
        let mut state = self.lock();
        state.touch(page, true)?;
        if let Some(page) = state.pages.get_mut(&page) {
            page.bytes = page_of(value);
        }
        Ok(())
    }

    /// Announces that `range` is given up: one event for every mapping in it. [`SimHost::zap`] follows
    /// when they are read.
    pub fn announce_removal(&self, range: VaRange) {
        let parts = self.areas_in(range);
        self.lock().events.extend(parts.into_iter().map(|area| Event::Remove(area.range)));
    }

    /// The mappings in `range`, cut at its borders, in order.
    fn areas_in(&self, range: VaRange) -> Vec<Area> {
        let common = |area: &Area| area.range.intersect(range).map(|range| Area { range, ..*area });
        let mut parts: Vec<Area> = self.lock().areas.iter().filter_map(common).collect();
        parts.sort_by_key(|part| part.range.first());
        parts
    }

    /// How often it was asked about pages, or to have them there, so far.
    pub fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }

    /// Says from now on that it tells of no change of the program's.
    pub fn set_deaf(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// Takes the pages of `range` away, the second half of `MADV_DONTNEED`.
    pub fn zap(&self, range: VaRange) {
        self.lock().zap(range);
    }

    /// Unmaps `range`; the event waits to be read.
    pub fn unmap(&self, range: VaRange) {
        let mut state = self.lock();
        if !state.cut(range).is_empty() {
            state.zap(range);
            state.events.push_back(Event::Unmap(range));
        }
    }

    /// Moves the mapping of `from` to `to`, where nothing must be mapped; the event waits to be read.
    pub fn remap(&self, from: VaRange, to: Vpn) {
        let mut state = self.lock();
        let target = |page: Vpn| to.forward(page.since(from.first()));
        for area in state.cut(from) {
            let range = VaRange::page(target(area.range.first())).grow(area.range.pages());
            state.areas.push(Area { range, ..area });
        }
        for page in from.iter() {
            state.split_huge(page);
            if let Some(moved) = state.pages.remove(&page) {
                state.pages.insert(target(page), moved);
            }
            if state.poisoned.remove(&page) {
                state.poisoned.insert(target(page));
            }
        }
        state.events.push_back(Event::Remap(from, to.base()));
    }

    /// Reads an event.
    pub fn next_event(&self) -> Option<Event> {
        self.lock().events.pop_front()
    }
}

impl Park for SimHost {
    fn park(&self, word: &AtomicU32, expected: u32) {
        let held = self.parked.0.lock().unwrap_or_else(PoisonError::into_inner);
        if word.load(Ordering::Acquire) == expected {
            drop(self.parked.1.wait_timeout(held, Duration::from_millis(1)));
        }
    }

    fn unpark(&self, _word: &AtomicU32) {
        let _held = self.parked.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked.1.notify_all();
    }
}

impl Host for SimHost {
    fn can_move(&self) -> bool {
        !self.lock().plan.no_move
    }

    unsafe fn isolate(&self, range: VaRange, slot: VirtAddr) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        if state.area(range.first()).is_some_and(|area| range.end() > area.range.end()) {
            // As in the kernel, which looks at both ends before it moves anything.
            return Progress::stopped(PageCount::ZERO, Stop::Refused);
        }
        let (memory, slots) = self.slots_at(slot);
        let first = memory.index(slot);
        let huge = is_chunk(range) && slots == Slots::Arena && slot.is_aligned_to(CHUNK_PAGES * PAGE_SIZE);
        let huge = huge && state.huge.contains(&range.first().chunk());
        let progress = state.each(range, |state, page, n| {
            let area = state.area(page).ok_or(Stop::Unmapped)?;
            if state.plan.no_move || area.read_only {
                return Err(Stop::Refused);
            }
            if state.slots(slots).contains(&(first + n)) {
                return Err(Stop::Present);
            }
            match state.pages.get(&page) {
                None => return Err(Stop::Hole),
                Some(page) if page.pinned => return Err(Stop::Busy),
                Some(_) => {}
            }
            state.split_huge(page);
            let moved = state.pages.remove(&page).ok_or(Stop::Hole)?;
            memory.write(first + n, &moved.bytes);
            state.slots_mut(slots).insert(first + n);
            Ok(())
        });
        if huge && progress.is_complete() {
            state.huge_frames.insert(first / CHUNK_PAGES);
        }
        progress
    }

    unsafe fn install(&self, slot: VirtAddr, range: VaRange) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        let (memory, slots) = self.slots_at(slot);
        let first = memory.index(slot);
        let progress = state.each(range, |state, page, n| {
            if state.plan.no_move {
                return Err(Stop::Refused);
            }
            state.vacant(page, true)?;
            if !state.slots_mut(slots).remove(&(first + n)) {
                return Err(Stop::Hole);
            }
            state.pages.insert(page, Page::of(memory.read(first + n)));
            if slots == Slots::Device {
                memory.write(first + n, &[0xdb; PAGE_SIZE]);
            }
            Ok(())
        });
        if slots == Slots::Arena
            && state.huge_frames.remove(&(first / CHUNK_PAGES))
            && progress.is_complete()
            && is_chunk(range)
        {
            state.huge.insert(range.first().chunk());
        }
        progress
    }

    unsafe fn install_copy(&self, source: NonNull<u8>, range: VaRange, how: Install) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        state.each(range, |state, page, n| {
            state.vacant(page, false)?;
            let mut bytes = vec![0; PAGE_SIZE].into_boxed_slice();
            // SAFETY: the caller says that the source is readable for the length of the range.
            unsafe {
                source.add(n * PAGE_SIZE).as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_SIZE)
            };
            let protected = how == Install::Tracked;
            state.pages.insert(page, Page { protected, ..Page::of(bytes) });
            Ok(())
        })
    }

    /// Holes are filled with zeros on the way: the copy touches them, and its own fault is resolved so.
    unsafe fn copy_out(&self, range: VaRange, slot: VirtAddr) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        let (memory, slots) = self.slots_at(slot);
        let first = memory.index(slot);
        let progress = state.each(range, |state, page, n| {
            state.area(page).ok_or(Stop::Unmapped)?;
            if state.slots(slots).contains(&(first + n)) {
                return Err(Stop::Present);
            }
            let source = state.pages.entry(page).or_insert_with(|| Page::of(page_of(0)));
            memory.write(first + n, &source.bytes);
            state.copied_out += 1;
            state.slots_mut(slots).insert(first + n);
            Ok(())
        });
        drop(state);
        let hook = self.after_copy_out.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(hook) = hook {
            hook();
        }
        progress
    }

    fn install_zero(&self, range: VaRange) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        state.each(range, |state, page, _| {
            if let Some(backed) = self.is_backed(state, page) {
                let (memory, slots) = self.slots_at(page.base());
                memory.write(memory.index(page.base()), &page_of(0));
                state.slots_mut(slots).insert(memory.index(page.base()));
                return if backed { Err(Stop::Present) } else { Ok(()) };
            }
            state.vacant(page, false)?;
            state.pages.insert(page, Page::of(page_of(0)));
            Ok(())
        })
    }

    fn write_protect(&self, range: VaRange, protect: bool) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        state.each(range, |state, page, _| {
            state.area(page).ok_or(Stop::Unmapped)?;
            if let Some(page) = state.pages.get_mut(&page) {
                page.protected = protect;
            }
            Ok(())
        })
    }

    unsafe fn discard(&self, range: VaRange) -> Progress {
        if let Err(progress) = self.lock().enter(false) {
            return progress;
        }
        // Mapping by mapping, like the kernel, which does not say how far it came when one refuses.
        for area in self.areas_in(range) {
            if area.locked {
                return Progress::stopped(PageCount::ZERO, Stop::Refused);
            }
            self.announce_removal(area.range);
            let reader = self.reader.get().expect("somebody reads the events");
            reader();
            self.zap(area.range);
        }
        Progress::complete(range.pages())
    }

    fn is_huge(&self, range: VaRange) -> bool {
        is_chunk(range) && self.lock().huge.contains(&range.first().chunk())
    }

    fn present(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn) {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let state = self.lock();
        let mut filled = 0;
        if self.is_backed(&state, range.first()).is_some() {
            for page in range.iter().filter(|page| self.is_backed(&state, *page) == Some(true)) {
                let Some(place) = found.get_mut(filled) else { return (filled, page) };
                *place = VaRange::page(page);
                filled += 1;
            }
            return (filled, range.end_page());
        }
        for (page, _) in state.pages.range(range.first()..range.end_page()) {
            if filled == found.len() {
                return (filled, *page);
            }
            found[filled] = VaRange::page(*page);
            filled += 1;
        }
        (filled, range.end_page())
    }

    fn holes(&self, range: VaRange, found: &mut [VaRange]) -> (usize, Vpn) {
        let state = self.lock();
        let mut filled = 0;
        let is_hole = |page: &Vpn| match self.is_backed(&state, *page) {
            Some(backed) => !backed,
            None => state.vacant(*page, false).is_ok(),
        };
        for page in range.iter().filter(is_hole) {
            if filled == found.len() {
                return (filled, page);
            }
            found[filled] = VaRange::page(page);
            filled += 1;
        }
        (filled, range.end_page())
    }

    fn mappings(&self, range: VaRange, found: &mut [Rights]) -> (usize, Vpn) {
        let areas = self.areas_in(range);
        for (place, area) in found.iter_mut().zip(&areas) {
            *place =
                Rights { range: area.range, read: true, write: !area.read_only, shared: false, file: false };
        }
        let end = areas.get(found.len()).map_or(range.end_page(), |area| area.range.first());
        (areas.len().min(found.len()), end)
    }

    fn unusual(&self, range: VaRange, _sort: Sort, found: &mut [Unusual]) -> (usize, Vpn) {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let state = self.lock();
        let mut filled: usize = 0;
        for page in range.iter() {
            let absent = Unusual::absent(VaRange::page(page));
            let this = match state.pages.get(&page) {
                None => absent,
                Some(what) => Unusual {
                    present: true,
                    write: !what.protected,
                    huge: state.huge.contains(&page.chunk()),
                    ..absent
                },
            };
            if this.present && this.write && !this.huge {
                continue;
            }
            let last = filled.checked_sub(1).map(|last| &mut found[last]);
            if let Some(last) = last
                && last.range.end_page() == page
                && *last == (Unusual { range: last.range, ..this })
            {
                last.range = last.range.grow(last.range.pages().plus(PageCount::ONE));
                continue;
            }
            let Some(place) = found.get_mut(filled) else { return (filled, page) };
            *place = this;
            filled += 1;
        }
        (filled, range.end_page())
    }

    /// There is neither swap nor a page of zeros that is shared.
    fn touch(&self, range: VaRange, _write: bool) -> Progress {
        self.looks.fetch_add(1, Ordering::Relaxed);
        match self.lock().enter(false) {
            Ok(()) => Progress::complete(range.pages()),
            Err(progress) => progress,
        }
    }

    fn hears(&self) -> bool {
        !self.deaf.load(Ordering::Relaxed)
    }

    fn is_changing(&self) -> bool {
        !self.lock().events.is_empty()
    }

    unsafe fn release(&self, runs: &[VaRange]) {
        let mut state = self.lock();
        for slot in runs.iter().flat_map(|run| run.iter()) {
            let (memory, slots) = self.slots_at(slot.base());
            let index = memory.index(slot.base());
            if slots == Slots::Device {
                state.slots_mut(slots).remove(&index);
                continue;
            }
            state.framed.remove(&index);
            state.huge_frames.remove(&(index / CHUNK_PAGES));
        }
    }

    fn wake(&self, _range: VaRange) {}

    fn poison(&self, range: VaRange) -> Progress {
        let mut state = self.lock();
        if let Err(progress) = state.enter(true) {
            return progress;
        }
        state.each(range, |state, page, _| {
            state.vacant(page, false)?;
            state.poisoned.insert(page);
            Ok(())
        })
    }
}
