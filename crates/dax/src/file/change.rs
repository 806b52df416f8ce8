//! Changes of where files' blocks are.
//!
//! What     making, removing, shortening, lengthening, punching and sharing files; and blocks for what is about to be
//!          written or mapped.
//! Order    of what gives blocks: make them zero (or a copy), and safe; write the table; show them in mappings.
//!          Of what takes blocks: claim them, waiting without a lock while somebody uses them; write the table; give
//!          mappings what they are to show; only then are the blocks free, and the claim is given up.
//! Fails    with nothing changed, but for one case: the table is written and the kernel has no memory to change a
//!          mapping. Then the change has happened, and the blocks that it took away stay nobody's until the files are
//!          opened the next time, because the mapping may still show them.

use std::collections::BTreeSet;
use std::sync::MutexGuard;

use uhmm_addr::{ByteSize, PfnRange};
use uhmm_core::pagemap::UniquePages;
use uhmm_sys::dax::Protection;

use super::layout::{GiveUp, Patience, Waiting, claim};
use super::meta::Record;
use super::runs::Run;
use super::{Body, FileError, SIZE_MAX, State};

/// A file, by number, and by the name that an error has.
#[derive(Clone, Copy)]
pub(super) struct Which<'a> {
    pub(super) inode: u64,
    pub(super) name: &'a str,
}

impl State {
    pub(super) fn record(&self, which: Which<'_>) -> Result<&Record, FileError> {
        self.files.get(&which.inode).ok_or_else(|| FileError::Unknown { name: which.name.into() })
    }
}

impl Body {
    pub(super) fn create(&self, name: &str) -> Result<u64, FileError> {
        let mut state = self.lock();
        self.add(&mut state, name, Record::default())
    }

    /// A new file that is like `record`.
    fn add(&self, state: &mut State, name: &str, record: Record) -> Result<u64, FileError> {
        if name.is_empty() || name.len() > 255 || name.contains('/') || name.contains(char::is_control) {
            return Err(FileError::Name { name: name.into() });
        }
        if state.names.contains_key(name) {
            return Err(FileError::Exists { name: name.into() });
        }
        let inode = state.next_inode;
        self.meta.create(name, inode, &record)?;
        state.next_inode += 1;
        state.names.insert(name.to_owned(), inode);
        state.files.insert(inode, record);
        Ok(inode)
    }

    /// Claims the blocks that `pick` picks of a file, as far as they are its own, and gives the lock back with them. Waits
    /// with no lock held.
    fn break_layouts(
        &self,
        which: Which<'_>,
        patience: &Patience,
        pick: impl Fn(&Record) -> Vec<Run>,
    ) -> Result<(MutexGuard<'_, State>, Vec<UniquePages>), FileError> {
        let waiting = Waiting::begin(patience);
        loop {
            let seen = self.driver.turn.now();
            let state = self.lock();
            let own = state.unshared(pick(state.record(which)?).into_iter());
            let ranges: Vec<PfnRange> =
                own.iter().flat_map(|run| self.blocks.pfns(run.block, run.len)).collect();
            let (busy, references) = match claim(&self.blocks.pagemap, &ranges) {
                Ok(claims) => return Ok((state, claims)),
                Err(busy) => busy,
            };
            let block = self.blocks.block_of(busy).unwrap_or_default();
            let at = own.iter().find(|run| run.block <= block && block < run.block + run.len);
            let offset = at.map_or(0, |run| (run.at + block - run.block) * self.blocks.bytes());
            drop(state);
            waiting.go_on(&self.driver.turn, seen).map_err(|why| match why {
                GiveUp::Interrupted => FileError::Interrupted { offset },
                GiveUp::TimedOut(waited) => FileError::Busy { offset, references, waited },
            })?;
        }
    }

    /// Blocks that a file has no longer: the last one to have them makes them free. The claims end with that.
    fn release(&self, state: &mut State, runs: impl Iterator<Item = Run>, claims: Vec<UniquePages>) {
        let mut last = BTreeSet::new();
        for run in runs {
            for block in run.block..run.block + run.len {
                match state.shared.get_mut(&block) {
                    Some(1) => {
                        state.shared.remove(&block);
                        last.insert(block);
                    }
                    Some(more) => *more -= 1,
                    None => {
                        self.blocks.identify(block, 0);
                        state.free.give(block, 1);
                    }
                }
            }
        }
        self.associate_last(state, &last);
        drop(claims);
    }

    /// Free blocks, `count` of them, as runs from block `at` of a file on; zero, and safe.
    fn allocate(&self, state: &mut State, mut at: u64, count: u64) -> Result<Vec<Run>, FileError> {
        let (mut runs, mut lost) = (Vec::new(), Vec::new());
        let (mut wanted, mut failed) = (count, None);
        while wanted > 0 && failed.is_none() {
            let Some((block, len)) = state.free.take(wanted) else {
                let free = state.free.total() + count - wanted;
                let bytes = |blocks: u64| ByteSize::new(blocks * self.blocks.bytes());
                failed = Some(FileError::Full { wanted: bytes(count), free: bytes(free) });
                break;
            };
            let mut from = block;
            while from < block + len {
                let is_lost = self.blocks.is_lost(from);
                let end = (from..block + len).find(|block| self.blocks.is_lost(*block) != is_lost);
                let run = Run { at, block: from, len: end.unwrap_or(block + len) - from };
                from += run.len;
                if is_lost {
                    lost.push(run);
                    continue;
                }
                let bytes = self.blocks.bytes();
                failed = self
                    .blocks
                    .zero(run.block * bytes, run.len * bytes)
                    .err()
                    .map(FileError::from)
                    .or(failed);
                (at, wanted) = (at + run.len, wanted - run.len);
                runs.push(run);
            }
        }
        // Nobody could use them.
        lost.iter().for_each(|run| state.free.give(run.block, run.len));
        if let Some(error) = failed {
            give_back(state, &runs);
            return Err(error);
        }
        Ok(runs)
    }

    /// Gives a file blocks where it has none among `from..to`, and where `own` is said, blocks of its own where it shares
    /// them, with what those hold.
    pub(super) fn provide(
        &self,
        state: &mut State,
        which: Which<'_>,
        (from, to): (u64, u64),
        own: bool,
    ) -> Result<(), FileError> {
        let mut record = state.record(which)?.clone();
        let mut fresh = Vec::new();
        let mut given_up = Vec::new();
        let provided = (|| {
            for (from, to) in record.runs.holes(from, to) {
                fresh.extend(self.allocate(state, from, to - from)?);
            }
            let runs: Vec<Run> = record.runs.within(from, to).filter(|_| own).collect();
            for run in runs {
                for n in 0..run.len {
                    if !state.is_shared(run.block + n) {
                        continue;
                    }
                    if self.blocks.is_lost(run.block + n) {
                        return Err(FileError::Poisoned { offset: (run.at + n) * self.blocks.bytes() });
                    }
                    let copy = self.allocate(state, run.at + n, 1)?;
                    fresh.extend(&copy);
                    self.blocks.copy(run.block + n, copy[0].block)?;
                    given_up.push(Run { at: run.at + n, block: run.block + n, len: 1 });
                }
            }
            record.runs.replace(fresh.clone());
            if fresh.is_empty() { Ok(()) } else { Ok(self.meta.update(which.inode, &record)?) }
        })();
        if let Err(error) = provided {
            give_back(state, &fresh);
            return Err(error);
        }
        state.files.insert(which.inode, record);
        for run in &fresh {
            self.associate(state, which.inode, *run);
            for view in self.views_of(which.inode) {
                view.show(run.at, run.block, run.len)?;
            }
        }
        self.release(state, given_up.into_iter(), Vec::new());
        Ok(())
    }

    /// Blocks that were several files' are one's each.
    fn associate_last(&self, state: &State, blocks: &BTreeSet<u64>) {
        if blocks.is_empty() {
            return;
        }
        for (inode, record) in &state.files {
            for run in record.runs.iter() {
                for block in blocks.range(run.block..run.block + run.len) {
                    let at = run.at + (block - run.block);
                    self.associate(state, *inode, Run { at, block: *block, len: 1 });
                }
            }
        }
    }

    /// Makes a file so long. What it gains reads as zeros, in mappings as well.
    pub(super) fn lengthen(&self, state: &mut State, which: Which<'_>, size: u64) -> Result<(), FileError> {
        let block = self.blocks.bytes();
        let mut record = state.record(which)?.clone();
        let (old, end) = (record.size, size.div_ceil(block));
        if size > SIZE_MAX {
            return Err(FileError::TooLong { offset: old, len: size - old });
        }
        if !old.is_multiple_of(block) && record.runs.within(old / block, old / block + 1).next().is_some() {
            // What lay behind the old end was nobody's to read.
            self.provide(state, which, (old / block, old / block + 1), true)?;
            record = state.record(which)?.clone();
            if let Some(run) = record.runs.within(old / block, old / block + 1).next() {
                let inside = old % block;
                self.blocks.zero(run.block * block + inside, block - inside)?;
            }
        }
        record.size = size;
        self.meta.update(which.inode, &record)?;
        state.files.insert(which.inode, record);
        for view in self.views_of(which.inode) {
            if let Some(part) = view.overlap(old.div_ceil(block), end) {
                self.provide(state, which, part, view.protection == Protection::ReadWrite)?;
            }
        }
        Ok(())
    }

    pub(super) fn truncate(&self, which: Which<'_>, size: u64, patience: &Patience) -> Result<(), FileError> {
        let block = self.blocks.bytes();
        let keep = size.div_ceil(block);
        // The block that is cut as well: it is made zero behind the cut.
        let behind = |record: &Record| match record.size {
            now if size < now => record.runs.within(size / block, u64::MAX).collect(),
            _ => Vec::new(),
        };
        let (mut state, claims) = self.break_layouts(which, patience, behind)?;
        let mut record = state.record(which)?.clone();
        if size >= record.size {
            return if size == record.size { Ok(()) } else { self.lengthen(&mut state, which, size) };
        }
        record.size = size;
        let taken = record.runs.remove(keep, u64::MAX);
        self.meta.update(which.inode, &record)?;
        let last = record.runs.within(size / block, keep).next();
        state.files.insert(which.inode, record);
        for view in self.views_of(which.inode) {
            view.hide(keep, u64::MAX)?;
        }
        if let Some(run) = last.filter(|run| !state.is_shared(run.block) && !self.blocks.is_lost(run.block)) {
            // Mappings show the whole block.
            self.blocks.zero(run.block * block + size % block, block - size % block)?;
        }
        self.release(&mut state, taken.into_iter(), claims);
        Ok(())
    }

    /// Makes `offset..offset + len` read as zeros: whole blocks are given back, except where they are mapped, which get
    /// fresh ones. The size stays.
    pub(super) fn punch(
        &self,
        which: Which<'_>,
        offset: u64,
        len: u64,
        patience: &Patience,
    ) -> Result<(), FileError> {
        let block = self.blocks.bytes();
        let end = offset.checked_add(len).filter(|end| *end <= SIZE_MAX);
        let end = end.ok_or(FileError::TooLong { offset, len })?;
        let (from, to) = (offset.div_ceil(block), end / block);
        let whole =
            |record: &Record| if from < to { record.runs.within(from, to).collect() } else { Vec::new() };
        let (mut state, claims) = self.break_layouts(which, patience, whole)?;
        let mut record = state.record(which)?.clone();
        let end = end.min(record.size);
        if from < to {
            let taken = record.runs.remove(from, to);
            let mut shown: Vec<(u64, u64)> =
                self.views_of(which.inode).iter().filter_map(|view| view.overlap(from, to)).collect();
            shown.sort_unstable();
            let mut fresh = Vec::new();
            let reached = record.size.div_ceil(block);
            let mut done = from;
            for (from, to) in shown {
                let (from, to) = (from.max(done), to.min(reached));
                done = done.max(to);
                for (from, to) in record.runs.holes(from, to.max(from)) {
                    let more = match self.allocate(&mut state, from, to - from) {
                        Ok(more) => more,
                        Err(error) => {
                            give_back(&mut state, &fresh);
                            return Err(error);
                        }
                    };
                    fresh.extend(more);
                }
            }
            record.runs.replace(fresh.clone());
            if let Err(error) = self.meta.update(which.inode, &record) {
                give_back(&mut state, &fresh);
                return Err(error.into());
            }
            state.files.insert(which.inode, record);
            for run in fresh {
                self.associate(&state, which.inode, run);
                for view in self.views_of(which.inode) {
                    view.show(run.at, run.block, run.len)?;
                }
            }
            self.release(&mut state, taken.into_iter(), claims);
        }
        // What is left at both ends is less than a block.
        let edges = [(offset, end.min(from * block)), (offset.max(to * block), end)];
        for (at, end) in edges.into_iter().filter(|(at, end)| at < end).take(if from > to { 1 } else { 2 }) {
            let part = (at / block, at / block + 1);
            if state.record(which)?.runs.within(part.0, part.1).next().is_some() {
                self.provide(&mut state, which, part, true)?;
                if let Some(run) = state.record(which)?.runs.within(part.0, part.1).next() {
                    self.blocks.zero(run.block * block + at % block, end - at)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn remove(&self, name: &str, patience: &Patience) -> Result<(), FileError> {
        let unknown = || FileError::Unknown { name: name.into() };
        let inode = *self.lock().names.get(name).ok_or_else(unknown)?;
        let all = |record: &Record| record.runs.iter().collect();
        let (mut state, claims) = self.break_layouts(Which { inode, name }, patience, all)?;
        self.meta.remove(name, inode)?;
        state.names.remove(name);
        let record = state.files.remove(&inode).unwrap_or_default();
        for view in self.views_of(inode) {
            view.hide(0, u64::MAX)?;
        }
        self.release(&mut state, record.runs.iter(), claims);
        Ok(())
    }

    /// A new file with the contents of another one, whose blocks both have from now on; those that are mapped for writing
    /// are copied. Waits until no page of it is in use: a transfer would write to both.
    pub(super) fn reflink(
        &self,
        which: Which<'_>,
        name: &str,
        patience: &Patience,
    ) -> Result<u64, FileError> {
        let all = |record: &Record| record.runs.iter().collect();
        let (mut state, claims) = self.break_layouts(which, patience, all)?;
        let mut record = state.record(which)?.clone();
        let (mut copied, mut own) = (Vec::new(), BTreeSet::new());
        let views = self.views_of(which.inode);
        let made = (|| {
            for view in views.iter().filter(|view| view.protection == Protection::ReadWrite) {
                let runs: Vec<Run> = record.runs.within(view.first, view.first + view.len).collect();
                for run in
                    runs.into_iter().flat_map(|run| (0..run.len).map(move |n| (run.at + n, run.block + n)))
                {
                    // Another mapping shows it as well.
                    if !own.insert(run.0) {
                        continue;
                    }
                    if self.blocks.is_lost(run.1) {
                        return Err(FileError::Poisoned { offset: run.0 * self.blocks.bytes() });
                    }
                    let copy = self.allocate(&mut state, run.0, 1)?;
                    copied.extend(&copy);
                    self.blocks.copy(run.1, copy[0].block)?;
                }
            }
            record.runs.replace(copied.clone());
            self.add(&mut state, name, record.clone())
        })();
        let inode = match made {
            Ok(inode) => inode,
            Err(error) => {
                give_back(&mut state, &copied);
                return Err(error);
            }
        };
        for run in record.runs.iter() {
            for n in 0..run.len {
                if !own.contains(&(run.at + n)) {
                    *state.shared.entry(run.block + n).or_default() += 1;
                }
            }
            self.associate(&state, inode, run);
        }
        drop(claims);
        Ok(inode)
    }
}

/// Blocks that were taken for a change that did not happen.
fn give_back(state: &mut State, runs: &[Run]) {
    runs.iter().for_each(|run| state.free.give(run.block, run.len));
}
