//! fs-dax: files in a namespace, mapped where they lie.
//!
//! What     [`FileSystem`], the files of a namespace by name; [`DaxFile`], one of them, to read, write, shorten, punch,
//!          share ([`DaxFile::reflink`]), pin and map.
//! Why      a program that wants directly mapped memory by name should not have to divide a device itself.
//! Blocks   a block is a compound page of the namespace's alignment. The first ones hold the table of files
//!          (`meta`), every other one belongs to a file, to several (shared, copied when one of them writes), or to nobody.
//! Crashes  the table is one transaction a change. Blocks that a change gives to a file are zero, and safe, before
//!          it; blocks that it takes away are nobody's after it. What was written is safe when the call returns; a crash in
//!          the middle of a write leaves some of it, as in any file system without a journal of data.
//! Pages    are referred to while bytes are copied and while they are pinned; `layout` argues why a block that is
//!          referred to is given to nobody else. Its head's word says whose it is (`dax_associate_entry`).
//! Transfers that the kernel makes to a mapping's addresses are not seen here: pin the pages of the file first.
//! Locks    `state`, one for all that concerns where blocks are, held while the table is written; the list of `views`;
//!          a view's own. In this order. No lock is held while pages are waited for.
//! Fails    with [`FileError`]; a change that fails has not happened (`change` names the exception).

mod backend;
mod blocks;
mod change;
mod data;
mod error;
mod layout;
mod meta;
mod runs;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount, PfnRange, VirtAddr};
use uhmm_core::pagemap::{Failure, Pagemap, PagemapOps, Told};
use uhmm_sys::filelock::{self, FileLock, LockError};
use uhmm_sys::uffd::Uffd;

pub use data::PinnedFile;
pub use error::{FileError, FsError};
pub use layout::{Interrupt, Patience};
pub use meta::MetaError;
pub use view::FileMapping;

use crate::device::attendant::{Attendant, Attended};
use crate::device::mapped::Outcome;
use crate::device::source::Source;
use crate::store::{BadPages, ChangeError, Extent, Mode, NamespaceId, Store};
use backend::Backend;
use blocks::{Blocks, Front};
use layout::Turn;
use meta::{Meta, Record};
use runs::{Free, Run};
use view::View;

/// The byte of a store's file that says who has a namespace's files; the namespaces' follow.
const FILES_BYTE: u64 = 3 << 60;
/// The least room for the table of files.
const TABLE_MIN: u64 = 1 << 20;
/// The most.
const TABLE_MAX: u64 = 256 << 20;
/// Longer is no file.
const SIZE_MAX: u64 = 1 << 56;

/// The files of a namespace.
#[derive(Clone, Debug)]
pub struct FileSystem {
    inner: Arc<Inner>,
}

/// One file. It may be gone while this is still there: then everything says so.
#[derive(Clone, Debug)]
pub struct DaxFile {
    inner: Arc<Inner>,
    inode: u64,
    name: String,
}

/// What became of pages that broke.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FileLoss {
    /// Pages that nobody can read any more, blocks whole.
    pub pages: PageCount,
    /// Mappings from which they were taken away, in this process.
    pub mappings: usize,
    /// The files they are of, and where: first byte, and how many.
    pub files: Vec<(String, u64, u64)>,
}

/// Everything of a file system.
#[derive(Debug)]
pub(crate) struct Inner {
    // Ends first.
    _attendant: Attendant,
    body: Arc<Body>,
}

/// What its thread needs as well.
#[derive(Debug)]
pub(crate) struct Body {
    blocks: Arc<Blocks>,
    meta: Meta,
    state: Mutex<State>,
    driver: Arc<Driver>,
}

/// Where blocks are.
#[derive(Debug, Default)]
struct State {
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Record>,
    free: Free,
    /// Blocks that several files have, with how many more than one.
    shared: BTreeMap<u64, u32>,
    next_inode: u64,
    /// Pages of the namespace that are known to be bad.
    marks: BadPages,
}

/// The pagemap's driver.
#[derive(Debug, Default)]
struct Driver {
    turn: Turn,
    views: Mutex<Vec<Weak<View>>>,
    blocks: std::sync::OnceLock<Weak<Blocks>>,
}

impl Driver {
    fn add(&self, view: &Arc<View>) {
        self.views.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(view));
    }

    fn views(&self) -> Vec<Arc<View>> {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        views.retain(|view| view.strong_count() > 0);
        views.iter().filter_map(Weak::upgrade).collect()
    }
}

impl PagemapOps for Driver {
    fn page_free(&self, _: &Pagemap, _: PfnRange) {
        self.turn.next();
    }

    fn memory_failure(&self, _: &Pagemap, failure: &Failure) -> Told {
        let blocks = self.blocks.get().and_then(Weak::upgrade);
        let block = blocks.and_then(|blocks| blocks.block_of(failure.pages.start));
        let told = |block| self.views().iter().filter(|view| view.reconsider(block).unwrap_or(true)).count();
        Told::Mappers(block.map_or(0, told))
    }
}

impl FileSystem {
    /// The files of the namespace `id`, which is in the mode fsdax. A namespace without any is made ready for them.
    pub fn open(store: &Arc<Store>, id: NamespaceId) -> Result<Self, FsError> {
        let source = Source::namespace(store, id, Mode::FsDax)?;
        let device = source.name.clone();
        let io = |error| FsError::Io { device: device.clone(), error };
        let file = filelock::reopened(store.medium().fd()).map_err(io)?;
        let byte = FILES_BYTE + u64::from(id.0);
        let alone = FileLock::try_acquire(file, byte, filelock::Kind::Exclusive);
        let alone = alone.map_err(|error| match error {
            LockError::Held => FsError::InUse { device: device.clone(), holders: store.holders(byte) },
            LockError::Os(error) => io(error),
        })?;
        let driver = Arc::new(Driver::default());
        view::install().map_err(crate::device::DeviceError::from)?;
        let blocks = Arc::new(Blocks::new(source, driver.clone(), alone)?);
        let _ = driver.blocks.set(Arc::downgrade(&blocks));
        let table =
            (blocks.source.size().bytes() / 64).clamp(TABLE_MIN, TABLE_MAX).next_multiple_of(blocks.bytes());
        let first = table / blocks.bytes();
        if first >= blocks.count() {
            let least = ByteSize::new(table + blocks.bytes());
            return Err(FsError::TooSmall { device, size: blocks.source.size(), least });
        }
        let front = Arc::new(Front::new(blocks.clone()));
        let backend = Backend::open(front, table, blocks.source.align).map_err(io)?;
        let meta = Meta::open(backend).map_err(|error| FsError::Meta { device: device.clone(), error })?;
        let files = meta.files().map_err(|error| FsError::Meta { device: device.clone(), error })?;
        let state = State::of(files, first, blocks.count())
            .map_err(|(name, block)| FsError::Inconsistent { device: device.clone(), name, block })?;
        let body = Arc::new(Body { blocks, meta, state: Mutex::new(state), driver });
        body.identify_all();
        body.follow(&mut body.lock()).map_err(crate::device::DeviceError::from)?;
        let attendant = Attendant::start(body.clone()).map_err(io)?;
        Ok(Self { inner: Arc::new(Inner { _attendant: attendant, body }) })
    }

    /// Every file's name, in order.
    pub fn list(&self) -> Vec<String> {
        self.inner.body.lock().names.keys().cloned().collect()
    }

    /// Free space.
    pub fn free(&self) -> ByteSize {
        let body = &self.inner.body;
        ByteSize::new(body.lock().free.total() * body.blocks.bytes())
    }

    /// Bytes of a block: what is mapped, shared, punched and poisoned at a time.
    pub fn block(&self) -> u64 {
        self.inner.body.blocks.bytes()
    }

    /// The pages' counts, and whether they are lost.
    pub fn pagemap(&self) -> &Arc<Pagemap> {
        &self.inner.body.blocks.pagemap
    }

    /// A new file, empty.
    pub fn create(&self, name: &str) -> Result<DaxFile, FileError> {
        let inode = self.inner.body.create(name)?;
        Ok(self.file(name, inode))
    }

    /// A file that is there.
    pub fn file_named(&self, name: &str) -> Result<DaxFile, FileError> {
        let inode = self.inner.body.lock().names.get(name).copied();
        inode.map(|inode| self.file(name, inode)).ok_or_else(|| FileError::Unknown { name: name.into() })
    }

    /// Removes a file, when nobody uses its pages any more. Its mappings raise SIGBUS.
    pub fn remove(&self, name: &str, patience: &Patience) -> Result<(), FileError> {
        self.inner.body.remove(name, patience)
    }

    fn file(&self, name: &str, inode: u64) -> DaxFile {
        DaxFile { inner: self.inner.clone(), inode, name: name.to_owned() }
    }
}

impl State {
    /// What follows from the files that there are: or the file with a block that it cannot have.
    fn of(files: Vec<(String, u64, Record)>, first: u64, count: u64) -> Result<Self, (String, u64)> {
        let mut state = Self { next_inode: 1, ..Self::default() };
        state.free.give(first, count - first);
        for (name, inode, record) in files {
            for run in record.runs.iter() {
                if run.block < first || run.block.checked_add(run.len).is_none_or(|end| end > count) {
                    return Err((name, run.block));
                }
                for block in run.block..run.block + run.len {
                    if !state.free.reserve(block, 1) {
                        *state.shared.entry(block).or_default() += 1;
                    }
                }
            }
            // `Meta::files` refuses the last number.
            state.next_inode = state.next_inode.max(inode + 1);
            state.names.insert(name, inode);
            state.files.insert(inode, record);
        }
        Ok(state)
    }

    fn is_shared(&self, block: u64) -> bool {
        self.shared.contains_key(&block)
    }

    /// The runs that no other file has, cut where that changes.
    fn unshared(&self, runs: impl Iterator<Item = Run>) -> Vec<Run> {
        let mut own = Vec::new();
        for run in runs {
            let mut from = run.block;
            let shared: Vec<u64> =
                self.shared.range(run.block..run.block + run.len).map(|(block, _)| *block).collect();
            for block in shared.into_iter().chain([run.block + run.len]) {
                if from < block {
                    own.push(Run { at: run.at + (from - run.block), block: from, len: block - from });
                }
                from = block + 1;
            }
        }
        own
    }
}

impl Body {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mappings of a file.
    fn views_of(&self, inode: u64) -> Vec<Arc<View>> {
        self.driver.views().into_iter().filter(|view| view.inode == inode).collect()
    }

    /// Makes pagemap and mappings agree with the labels.
    fn follow(&self, state: &mut State) -> Result<FileLoss, ChangeError> {
        let mut loss = FileLoss::default();
        let Some((store, claim)) = &self.blocks.source.store else { return Ok(loss) };
        let bad = store.table()?.bad_of(claim.namespace());
        let pages = self.blocks.pages();
        for page in bad.runs().iter().flat_map(|run| run.start..run.end()) {
            if state.marks.touches(Extent { start: page, len: 1 }) {
                continue;
            }
            let block = page / pages;
            let Some(head) = self.blocks.pfn(block) else { continue };
            let pfn = head.forward(PageCount::new((page % pages) as usize));
            let Ok(poisoned) = self.blocks.pagemap.memory_failure(pfn) else { continue };
            loss.mappings = loss.mappings.max(poisoned.told);
            if !poisoned.known {
                loss.pages = loss.pages.plus(poisoned.failure.pages.pages);
                let bytes = self.blocks.bytes();
                loss.files.extend(
                    self.owners(state, block).into_iter().map(|(name, at)| (name, at * bytes, bytes)),
                );
            }
        }
        for page in state.marks.runs().iter().flat_map(|run| run.start..run.end()) {
            if bad.touches(Extent { start: page, len: 1 }) {
                continue;
            }
            let block = page / pages;
            let Some(head) = self.blocks.pfn(block) else { continue };
            let pfn = head.forward(PageCount::new((page % pages) as usize));
            self.blocks.pagemap.clear_poison(PfnRange::new(pfn, PageCount::ONE));
            for view in self.driver.views() {
                view.reconsider(block)?;
            }
        }
        state.marks = bad;
        Ok(loss)
    }

    /// The bad pages among bytes of the namespace.
    fn bad_among(state: &State, at: u64, len: u64) -> Option<Extent> {
        let page = PAGE_SIZE as u64;
        let touched = Extent::between(at / page, (at + len).div_ceil(page))?;
        state.marks.among(touched).next()
    }

    fn identify_all(&self) {
        let state = self.lock();
        for (inode, record) in &state.files {
            record.runs.iter().for_each(|run| self.associate(&state, *inode, run));
        }
    }

    /// Notes whose blocks these are: a file and a place in it, or that they are shared.
    fn associate(&self, state: &State, inode: u64, run: Run) {
        for n in 0..run.len {
            let shared = state.is_shared(run.block + n);
            let at = run.at + n;
            let fits = inode >> INODE_BITS == 0 && at >> INDEX_BITS == 0;
            let whose = if shared || !fits { SHARED } else { OWNED | inode << INDEX_BITS | at };
            self.blocks.identify(run.block + n, whose);
        }
    }

    /// The files that have a block, and where in them, in blocks: the head's word says so, unless it is shared.
    fn owners(&self, state: &State, block: u64) -> Vec<(String, u64)> {
        let name = |inode| state.names.iter().find(|(_, own)| **own == inode).map(|(name, _)| name.clone());
        let word = self.blocks.identity(block);
        if word & OWNED != 0 {
            let (inode, at) = ((word & !OWNED) >> INDEX_BITS, word & ((1 << INDEX_BITS) - 1));
            return name(inode).map(|name| (name, at)).into_iter().collect();
        }
        let all = state.files.iter().flat_map(|(inode, record)| {
            let runs = record.runs.iter().filter(|run| run.block <= block && block < run.block + run.len);
            runs.filter_map(|run| Some((name(*inode)?, run.at + (block - run.block)))).collect::<Vec<_>>()
        });
        all.collect()
    }
}

/// In a head's word: one file's. Its number, and which block of it this is, are in the other bits.
const OWNED: u64 = 1 << 63;
/// Several files' (`PAGE_MAPPING_DAX_SHARED`), or one's whose numbers do not fit.
const SHARED: u64 = 1 << 62;
const INODE_BITS: u32 = 26;
const INDEX_BITS: u32 = 36;

impl Attended for Body {
    fn source(&self) -> &Source {
        &self.blocks.source
    }

    fn follow_labels(&self) {
        // The next change brings another try.
        let _ = self.follow(&mut self.lock());
    }

    fn faults(&self) -> Option<&Arc<Uffd>> {
        None
    }

    fn resolve(&self, _: VirtAddr) -> Outcome {
        Outcome::Gone
    }
}
