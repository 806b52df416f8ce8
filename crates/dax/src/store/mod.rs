//! A store: a file with labels, divided into namespaces.
//!
//! What     [`Store`], opened or created over a [`Medium`]; changes of its [`Table`], each of them whole or not at
//!          all; and [`Claim`], by which somebody uses a namespace.
//! Why      directly mapped memory outlives processes; what is where in it must survive any of them, at any moment.
//! Crashes  [`Labels`] has two copies, and argues why a crash leaves the state before a change or the one after it.
//! Shared   several processes may have a store open. A change holds the lock of the labels ([`FileLock`]), reads
//!          them anew, and writes them; a claim holds the lock of its namespace, shared. Resizing, reconfiguring
//!          and destroying need that lock alone.
//! Order    the store's own mutex, the labels' lock, a namespace's lock. The last is only ever tried, so that who
//!          holds one and wants another cannot wait for ever.
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
use label::LabelFault;
pub use labels::{Labels, LabelsError};
pub use medium::{Kind, Medium};
pub use namespace::{Mode, Namespace, NamespaceId, ParseModeError, Piece, Uuid};
pub use table::{Change, Spec, Table, TableError};

/// The byte that whoever changes the labels holds. Far behind any file's end, as are the others.
const LABELS_BYTE: u64 = 1 << 60;
/// The byte of namespace 0; the others' follow.
const NAMESPACE_BYTE: u64 = 1 << 61;
/// How long a change waits for another one to end.
const PATIENCE: Duration = Duration::from_secs(3);

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
        let (medium, labels) = Medium::create(path, capacity, |medium| format(medium, region))?;
        Ok(Self { medium, labels: Mutex::new(labels), bells: Mutex::default() })
    }

    /// Opens the store in the file at `path`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let medium = Medium::open(path)?;
        let labels = read(&medium)?;
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
        let labels = format(&medium, region)?;
        Ok(Self { medium, labels: Mutex::new(labels), bells: Mutex::default() })
    }

    /// What it lies on.
    pub fn medium(&self) -> &Medium {
        &self.medium
    }

    /// What is there now.
    pub fn table(&self) -> Result<Table, ChangeError> {
        let (labels, _lock) = self.locked()?;
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
        self.change(|table| {
            let id = table.create(spec, uuid)?;
            for extent in &table.get(id)?.extents {
                self.medium.zero(*extent)?;
            }
            Ok(id)
        })
    }

    /// Gives a namespace that nobody uses another size. What it gains is zero. Not one that holds files: where their blocks
    /// begin follows from its size.
    pub fn resize(&self, id: NamespaceId, size: ByteSize) -> Result<(), ChangeError> {
        self.change(|table| {
            let before = table.get(id)?.clone();
            if before.mode == Mode::FsDax {
                return Err(ChangeError::Files { device: table.device_name(id) });
            }
            table.resize(id, size)?;
            let _alone = self.alone(table, &before, Some(size))?;
            let had = before.pages().get() as u64;
            for piece in table.get(id)?.locate(had, u64::MAX - had) {
                self.medium.zero(piece.extent)?;
            }
            Ok(())
        })
    }

    /// Changes what a namespace that nobody uses is for, or how it is aligned or called. Its bytes stay.
    pub fn reconfigure(&self, id: NamespaceId, change: &Change) -> Result<(), ChangeError> {
        self.change(|table| {
            let before = table.get(id)?.clone();
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
        self.change(|table| {
            let before = table.bad().clone();
            table.mark(id, offset, len, false)?;
            let mut cleared = 0;
            for run in before.runs() {
                let mut mended = BadPages::new();
                mended.add(*run);
                table.bad().among(*run).for_each(|still| _ = mended.clear(still));
                for run in mended.runs() {
                    self.medium.zero(*run)?;
                    cleared += run.len as usize;
                }
            }
            Ok(PageCount::new(cleared))
        })
    }

    /// `bell` rings at every change that is made through this value, as long as anybody keeps it. Changes made by
    /// others are seen by a [`Watch`](uhmm_sys::watch::Watch) of the file.
    pub fn tell(&self, bell: &Arc<Bell>) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(bell));
    }

    /// Takes the right to use a namespace.
    pub fn claim(&self, id: NamespaceId) -> Result<Claim, ChangeError> {
        let (labels, _lock) = self.locked()?;
        labels.changeable()?;
        let namespace = labels.table().get(id)?.clone();
        let device = labels.table().device_name(id);
        // Who has it alone holds the labels' lock as well, so that nobody does now.
        match self.lock_of(id, filelock::Kind::Shared) {
            Ok(lock) => Ok(Claim { _lock: lock, namespace, device }),
            Err(LockError::Held) => {
                Err(ChangeError::Busy { device, holders: holders::holders(self.medium.fd()) })
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
                let holders = holders::holders(self.medium.fd());
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
        let (mut labels, _lock) = self.locked()?;
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

    /// The labels, read anew, and the right to change them.
    fn locked(&self) -> Result<(MutexGuard<'_, Labels>, FileLock), ChangeError> {
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let file = filelock::reopened(self.medium.fd())?;
        let deadline = Instant::now() + PATIENCE;
        let lock = loop {
            let file = file.as_fd().try_clone_to_owned()?;
            match FileLock::try_acquire(file, LABELS_BYTE, filelock::Kind::Exclusive) {
                Ok(lock) => break lock,
                Err(LockError::Os(error)) => return Err(error.into()),
                Err(LockError::Held) if Instant::now() > deadline => {
                    let holders = holders::holders(self.medium.fd());
                    return Err(ChangeError::Locked { seconds: PATIENCE.as_secs(), holders });
                }
                Err(LockError::Held) => thread::sleep(Duration::from_millis(1)),
            }
        };
        *labels = Labels::read(self.medium.labels())?;
        Ok((labels, lock))
    }
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

fn format(medium: &Medium, region: u32) -> Result<Labels, OpenError> {
    let path = || medium.path().unwrap_or(Path::new("memory")).to_path_buf();
    let uuid = Uuid::random().map_err(|error| io_error(path(), error))?;
    let table = Table::new(region, uuid, medium.kind().page(), medium.capacity());
    Labels::format(medium.labels(), table).map_err(|error| OpenError::Labels { path: path(), error })
}

fn io_error(path: std::path::PathBuf, error: io::Error) -> OpenError {
    OpenError::Io { action: "create", path, error }
}
