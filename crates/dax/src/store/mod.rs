//! A store: a file with labels, divided into namespaces.
//!
//! What     [`Store`], opened or created over a [`Medium`]; changes of its [`Table`], each of them whole or not at
//!          all; and [`Claim`], by which somebody uses a namespace.
//! Why      directly mapped memory outlives processes; what is where in it must survive any of them, at any moment.
//! Crashes  [`Labels`] has two copies, and argues why a crash leaves the state before a change or the one after it.
//! Shared   several processes may have a store open. A change holds the lock of the labels ([`FileLock`]), reads
//!          them anew, and writes them; who only reads holds it shared. A claim holds the lock of its namespace,
//!          shared. Resizing, reconfiguring and destroying need that lock alone.
//! Space    making pages zero may take minutes, and nobody else shall wait for that. So space is given out in three
//!          steps, by one at a time (the lock of space): look up what is free, and let go of the labels; make it zero;
//!          take the labels, and note whose it is. What is free stays free in between, because only who has that lock
//!          gives it out. A crash leaves pages that are nobody's, and zero.
//! Order    the lock of space, the labels' lock, the store's own mutex, a namespace's lock. The last is only ever tried,
//!          and the others are waited for so long at most, so that who holds one and wants another cannot wait for ever.
//! Fails    with [`OpenError`] and [`ChangeError`].

mod area;
mod bad;
mod error;
mod extent;
mod holders;
pub mod label;
pub mod labels;
mod medium;
mod namespace;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use uhmm_addr::{ByteSize, PageCount};
use uhmm_sys::filelock::{self, FileLock, LockError};
use uhmm_sys::hugetlb::Huge;
use uhmm_sys::watch::Bell;

pub use area::Area;
pub use bad::BadPages;
pub use error::{ChangeError, OpenError};
pub use extent::Extent;
pub use holders::Holder;
pub(crate) use holders::listed;
use label::LabelFault;
pub use labels::{Labels, LabelsError};
pub use medium::{Kind, Medium};
pub use namespace::{Mode, Namespace, NamespaceId, ParseModeError, Piece, Uuid};
pub use table::{Change, Spec, Table, TableError};

/// The byte that whoever changes the labels holds. Far behind any file's end, as are the others.
const LABELS_BYTE: u64 = 1 << 60;
/// The byte that whoever gives out space holds.
const SPACE_BYTE: u64 = LABELS_BYTE + 1;
/// The byte of namespace 0; the others' follow.
const NAMESPACE_BYTE: u64 = 1 << 61;
/// How long a change waits for another one to end.
const PATIENCE: Duration = Duration::from_secs(3);
/// So many pages are made zero at most while others wait for the labels.
const STEP: u64 = 4096;

/// A file with labels, divided into namespaces.
#[derive(Debug)]
pub struct Store {
    medium: Medium,
    /// As they were when they were last looked at; others may have changed them since.
    labels: Mutex<Labels>,
    /// Who is to be told of changes made through this value.
    bells: Mutex<Vec<Weak<Bell>>>,
}

/// The right to use a namespace, which keeps others from changing it.
#[derive(Debug)]
#[must_use = "dropped, the namespace may be changed or destroyed"]
pub struct Claim {
    _lock: FileLock,
    namespace: Namespace,
    device: String,
}

impl Claim {
    /// What is used.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its name: `dax0.1`.
    pub fn device_name(&self) -> &str {
        &self.device
    }
}

impl Store {
    /// Creates the file at `path` with room for `capacity` of data, and makes it a store. `region` is the `X` of
    /// its devices' names, `daxX.Y`. There must be no such file.
    pub fn create(path: &Path, capacity: ByteSize, region: u32) -> Result<Self, OpenError> {
        let (medium, (labels, _)) = Medium::create(path, capacity, |medium| format(medium, region, None))?;
        Ok(Self { medium, labels: Mutex::new(labels), bells: Mutex::default() })
    }

    /// The same, with a first namespace in it. There are both or neither, whatever happens meanwhile.
    pub fn create_with(
        path: &Path,
        capacity: ByteSize,
        region: u32,
        spec: &Spec,
    ) -> Result<(Self, NamespaceId), OpenError> {
        let (medium, (labels, id)) =
            Medium::create(path, capacity, |medium| format(medium, region, Some(spec)))?;
        Ok((Self { medium, labels: Mutex::new(labels), bells: Mutex::default() }, id))
    }

    /// Opens the store in the file at `path`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let medium = Medium::open(path)?;
        let labels = {
            let _lock =
                wait_for(&medium, LABELS_BYTE, filelock::Kind::Shared).map_err(|error| match error {
                    WaitError::Os(error) => OpenError::Io { action: "lock", path: path.into(), error },
                    WaitError::Held(holders) => {
                        OpenError::Locked { path: path.into(), seconds: PATIENCE.as_secs(), holders }
                    }
                })?;
            read(&medium)?
        };
        let table = labels.table();
        if table.capacity > medium.capacity() || table.page != medium.kind().page() {
            return Err(OpenError::OtherMedium {
                path: path.into(),
                labels: PageCount::new(table.capacity as usize).size(),
                page: table.page,
                found: PageCount::new(medium.capacity() as usize).size(),
                found_page: medium.kind().page(),
            });
        }
        Ok(Self { medium, labels: Mutex::new(labels), bells: Mutex::default() })
    }

    /// A store in memory, in huge pages if a size is given, that is gone with its last descriptor and mapping.
    pub fn memory(capacity: ByteSize, huge: Option<Huge>, region: u32) -> Result<Self, OpenError> {
        let medium = Medium::memory(capacity, huge)?;
        let (labels, _) = format(&medium, region, None)?;
        Ok(Self { medium, labels: Mutex::new(labels), bells: Mutex::default() })
    }

    /// What it lies on.
    pub fn medium(&self) -> &Medium {
        &self.medium
    }

    /// What is there now.
    pub fn table(&self) -> Result<Table, ChangeError> {
        let (labels, _lock) = self.locked(filelock::Kind::Shared)?;
        Ok(labels.table().clone())
    }

    /// What is wrong with the copy of the labels that is not in force, where that is worth a word.
    pub fn complaint(&self) -> Option<String> {
        let labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        match labels.other() {
            None | Some(LabelFault::Blank) => None,
            Some(fault) => {
                Some(format!("one of the two copies of the labels is {fault}; the other one is used"))
            }
        }
    }

    /// Makes a namespace, whose bytes are zero.
    pub fn create_namespace(&self, spec: &Spec) -> Result<NamespaceId, ChangeError> {
        let uuid = Uuid::random()?;
        let _space = self.lock(SPACE_BYTE, filelock::Kind::Exclusive)?;
        let namespace = {
            let (labels, _lock) = self.locked(filelock::Kind::Shared)?;
            labels.changeable()?;
            let mut table = labels.table().clone();
            let id = table.create(spec, uuid)?;
            table.get(id)?.clone()
        };
        let id = namespace.id;
        namespace.extents.iter().try_for_each(|extent| self.medium.zero(*extent))?;
        self.change(|table| table.put(namespace).map_err(taken))?;
        Ok(id)
    }

    /// Gives a namespace that nobody uses another size. What it gains is zero. Not one that holds files: where their blocks
    /// begin follows from its size.
    pub fn resize(&self, id: NamespaceId, size: ByteSize) -> Result<(), ChangeError> {
        let _space = self.lock(SPACE_BYTE, filelock::Kind::Exclusive)?;
        let (had, namespace, _alone) = {
            let (labels, _lock) = self.locked(filelock::Kind::Shared)?;
            labels.changeable()?;
            let mut table = labels.table().clone();
            let before = table.get(id)?.clone();
            if before.mode == Mode::FsDax {
                return Err(ChangeError::Files { device: table.device_name(id) });
            }
            table.resize(id, size)?;
            let alone = self.alone(&table, &before, Some(size))?;
            (before.pages().get() as u64, table.get(id)?.clone(), alone)
        };
        namespace.locate(had, u64::MAX - had).try_for_each(|piece| self.medium.zero(piece.extent))?;
        self.change(|table| table.put(namespace).map_err(taken))
    }

    /// Changes what a namespace that nobody uses is for, or how it is aligned or called. Its bytes stay. Not the alignment of
    /// one that holds files: that is the size of their blocks.
    pub fn reconfigure(&self, id: NamespaceId, change: &Change) -> Result<(), ChangeError> {
        self.change(|table| {
            let before = table.get(id)?.clone();
            let files = before.mode == Mode::FsDax && change.mode.is_none_or(|mode| mode == Mode::FsDax);
            if files && change.align.is_some_and(|align| align != before.align) {
                let device = table.device_name(id);
                return Err(ChangeError::FilesAlign { device, align: before.align });
            }
            table.reconfigure(id, change)?;
            let _alone = self.alone(table, &before, None)?;
            Ok(())
        })
    }

    /// Gives the space of a namespace that nobody uses back.
    pub fn destroy(&self, id: NamespaceId) -> Result<(), ChangeError> {
        self.change(|table| {
            let before = table.get(id)?.clone();
            table.destroy(id)?;
            let _alone = self.alone(table, &before, None)?;
            Ok(())
        })
    }

    /// Notes that `len` bytes from `offset` of a namespace on are bad, or good again; whole pages.
    /// Whoever uses the namespace learns of it.
    pub fn mark(&self, id: NamespaceId, offset: u64, len: u64, bad: bool) -> Result<(), ChangeError> {
        self.change(|table| Ok(table.mark(id, offset, len, bad)?))
    }

    /// Mends the bad pages among `len` bytes from `offset` of a namespace on, by writing them whole, with zeros. How many
    /// there were.
    pub fn clear_error(&self, id: NamespaceId, offset: u64, len: u64) -> Result<PageCount, ChangeError> {
        let mut cleared = 0;
        loop {
            let (some, more) = self.change(|table| {
                // It may be wrong, and says so.
                table.clone().mark(id, offset, len, false)?;
                let namespace = table.get(id)?.clone();
                let page = uhmm_addr::PAGE_SIZE as u64;
                let whole = Extent { start: offset / page, len: len / page };
                let (mut some, mut more) = (0, false);
                for run in table.bad_of(&namespace).among(whole) {
                    let len = run.len.min(STEP - some);
                    more |= len < run.len;
                    if len == 0 {
                        break;
                    }
                    for piece in namespace.locate(run.start, len) {
                        self.medium.zero(piece.extent)?;
                    }
                    let mended = Extent { start: run.start, len };
                    table.mark(id, mended.offset(), mended.bytes(), false)?;
                    some += len;
                }
                Ok((some, more))
            })?;
            cleared += some as usize;
            if !more {
                return Ok(PageCount::new(cleared));
            }
        }
    }

    /// `bell` rings at every change that is made through this value, as long as anybody keeps it. Changes made by
    /// others are seen by a [`Watch`](uhmm_sys::watch::Watch) of the file.
    pub fn tell(&self, bell: &Arc<Bell>) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(bell));
    }

    /// Takes the right to use a namespace.
    pub fn claim(&self, id: NamespaceId) -> Result<Claim, ChangeError> {
        let (labels, _lock) = self.locked(filelock::Kind::Shared)?;
        labels.changeable()?;
        let namespace = labels.table().get(id)?.clone();
        let device = labels.table().device_name(id);
        // Who has it alone holds the labels' lock as well, but for who gives it another size.
        match self.lock_of(id, filelock::Kind::Shared) {
            Ok(lock) => Ok(Claim { _lock: lock, namespace, device }),
            Err(LockError::Held) => {
                Err(ChangeError::Busy { device, holders: self.holders(NAMESPACE_BYTE + u64::from(id.0)) })
            }
            Err(LockError::Os(error)) => Err(error.into()),
        }
    }

    fn lock_of(&self, id: NamespaceId, kind: filelock::Kind) -> Result<FileLock, LockError> {
        let file = filelock::reopened(self.medium.fd())?;
        FileLock::try_acquire(file, NAMESPACE_BYTE + u64::from(id.0), kind)
    }

    /// Makes sure that nobody uses `namespace` until what is returned is dropped.
    fn alone(
        &self,
        table: &Table,
        namespace: &Namespace,
        size: Option<ByteSize>,
    ) -> Result<FileLock, ChangeError> {
        match self.lock_of(namespace.id, filelock::Kind::Exclusive) {
            Ok(lock) => Ok(lock),
            Err(LockError::Os(error)) => Err(error.into()),
            Err(LockError::Held) => {
                let device = table.device_name(namespace.id);
                let holders = self.holders(NAMESPACE_BYTE + u64::from(namespace.id.0));
                let mapped = self.mapped(namespace, &holders);
                Err(match size {
                    Some(size) if size < mapped => ChangeError::Mapped { device, size, mapped, holders },
                    _ => ChangeError::Busy { device, holders },
                })
            }
        }
    }

    /// How far somebody has mapped a namespace.
    fn mapped(&self, namespace: &Namespace, holders: &[Holder]) -> ByteSize {
        let ends = namespace.pieces().flat_map(|piece| {
            let at = self.medium.offset(piece.extent);
            let mapped = holders.iter().flat_map(|holder| &holder.mapped);
            mapped.filter_map(move |(from, to)| {
                let end = (*to).min(at + piece.extent.bytes());
                let before = piece.page * uhmm_addr::PAGE_SIZE as u64;
                (end > at && end > *from).then(|| before + (end - at))
            })
        });
        ByteSize::new(ends.max().unwrap_or(0))
    }

    /// Applies `change` to the newest labels and puts the result in force, if it succeeds.
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> Result<T, ChangeError>) -> Result<T, ChangeError> {
        let (mut labels, _lock) = self.locked(filelock::Kind::Exclusive)?;
        labels.changeable()?;
        let mut table = labels.table().clone();
        let done = change(&mut table)?;
        labels.write(self.medium.labels(), table)?;
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|bell| {
            bell.upgrade().is_some_and(|bell| {
                bell.ring();
                true
            })
        });
        Ok(done)
    }

    /// The labels, read anew, and the right to change them, or to read them while nobody does.
    fn locked(&self, kind: filelock::Kind) -> Result<(MutexGuard<'_, Labels>, FileLock), ChangeError> {
        let lock = self.lock(LABELS_BYTE, kind)?;
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        *labels = Labels::read(self.medium.labels())?;
        Ok((labels, lock))
    }

    fn lock(&self, byte: u64, kind: filelock::Kind) -> Result<FileLock, ChangeError> {
        wait_for(&self.medium, byte, kind).map_err(|error| match error {
            WaitError::Os(error) => error.into(),
            WaitError::Held(holders) => ChangeError::Locked { seconds: PATIENCE.as_secs(), holders },
        })
    }

    /// Who holds the lock of a byte of the store's file.
    pub(crate) fn holders(&self, byte: u64) -> Vec<Holder> {
        holders::holders(self.medium.fd(), byte)
    }
}

/// Why a lock is not had in time.
enum WaitError {
    Held(Vec<Holder>),
    Os(io::Error),
}

/// Takes the lock of a byte, for which others may have to be waited a moment.
fn wait_for(medium: &Medium, byte: u64, kind: filelock::Kind) -> Result<FileLock, WaitError> {
    let file = filelock::reopened(medium.fd()).map_err(WaitError::Os)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let file = file.as_fd().try_clone_to_owned().map_err(WaitError::Os)?;
        match FileLock::try_acquire(file, byte, kind) {
            Ok(lock) => return Ok(lock),
            Err(LockError::Os(error)) => return Err(WaitError::Os(error)),
            Err(LockError::Held) if Instant::now() > deadline => {
                return Err(WaitError::Held(holders::holders(medium.fd(), byte)));
            }
            Err(LockError::Held) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Somebody who does not know the lock of space has given these pages away.
fn taken(pages: Extent) -> ChangeError {
    let why = format!("the pages {pages:?} were given to another namespace meanwhile; try again");
    io::Error::new(io::ErrorKind::ResourceBusy, why).into()
}

fn read(medium: &Medium) -> Result<Labels, OpenError> {
    let path = || medium.path().unwrap_or(Path::new("memory")).to_path_buf();
    Labels::read(medium.labels()).map_err(|error| match error {
        LabelsError::Blank
        | LabelsError::Lost {
            first: LabelFault::Foreign(_) | LabelFault::Blank,
            second: LabelFault::Foreign(_) | LabelFault::Blank,
        } => OpenError::NoStore { path: path(), error },
        error => OpenError::Labels { path: path(), error },
    })
}

/// Writes the first labels, with a namespace where `first` says what it is to be. Its number has no meaning without.
fn format(medium: &Medium, region: u32, first: Option<&Spec>) -> Result<(Labels, NamespaceId), OpenError> {
    let path = || medium.path().unwrap_or(Path::new("memory")).to_path_buf();
    let uuid = Uuid::random().map_err(|error| io_error(path(), error))?;
    let mut table = Table::new(region, uuid, medium.kind().page(), medium.capacity());
    let mut id = NamespaceId(0);
    if let Some(spec) = first {
        // The file has just come into being: all of it is zero.
        let uuid = Uuid::random().map_err(|error| io_error(path(), error))?;
        id = table.create(spec, uuid)?;
    }
    let labels = Labels::format(medium.labels(), table);
    Ok((labels.map_err(|error| OpenError::Labels { path: path(), error })?, id))
}

fn io_error(path: std::path::PathBuf, error: io::Error) -> OpenError {
    OpenError::Io { action: "create", path, error }
}
