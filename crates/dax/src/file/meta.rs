//! The table of files.
//!
//! What     [`Meta`], which files there are, how long they are and where their blocks lie; [`Record`], one file.
//! Why      a change of a file is one transaction: after a crash there is the file before it or the file after it.
//! Owns     the database, which is the truth; whoever changes it holds the file system's lock.
//! Fails    with [`MetaError`]; then nothing has changed. After an error of its storage a database does nothing any more.
//!          Where that was a table without room for more, nothing was written that counts, and it is opened anew; where
//!          the medium failed it stays as it is, because nobody knows what is there until the files are opened again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use uhmm_addr::{ByteSize, PAGE_SIZE};

use super::SIZE_MAX;
use super::backend::{Backend, Lent};
use super::runs::{Run, Runs};

const NAMES: TableDefinition<'_, &str, u64> = TableDefinition::new("names");
const FILES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("files");

/// Empty but while a change is made that has the table grow.
const SPARE: TableDefinition<'_, (), &[u8]> = TableDefinition::new("spare");

/// Bytes that a change which has the table grow must leave free: taking something out of it needs pages as well, and
/// shall succeed when the table is full.
const SPARE_BYTES: usize = 60_000;

/// Bytes that the database may keep in memory.
const CACHE: usize = 4 << 20;

/// Why the table cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// It would outgrow its place.
    #[error("the table of files would outgrow the {room} that there are for it")]
    Full {
        /// How large it may be.
        room: ByteSize,
    },
    /// The database, or what it lies on, failed.
    #[error("the table of files: {0}")]
    Database(#[source] Box<redb::Error>),
}

fn failed(error: impl Into<redb::Error>) -> MetaError {
    MetaError::Database(Box::new(error.into()))
}

/// One file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Record {
    /// Its length in bytes.
    pub(super) size: u64,
    /// Its blocks.
    pub(super) runs: Runs,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.size.to_le_bytes().to_vec();
        for run in self.runs.iter() {
            [run.at, run.block, run.len].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let (size, runs) = words.split_first()?;
        let (runs, odd) = runs.as_chunks::<3>();
        if !rest.is_empty() || !odd.is_empty() {
            return None;
        }
        let runs = runs.iter().map(|[at, block, len]| Run { at: *at, block: *block, len: *len });
        let runs = Runs::checked(runs.collect())?;
        let end = runs.iter().last().map_or(0, |run| run.at + run.len);
        let fits = *size <= SIZE_MAX && end <= SIZE_MAX / PAGE_SIZE as u64;
        fits.then_some(Self { size: *size, runs })
    }
}

/// What a change asks of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Needs {
    /// It grows.
    Room,
    /// It does not.
    Nothing,
}

/// The table of files.
#[derive(Debug)]
pub(super) struct Meta {
    backend: Arc<Backend>,
    /// None where it could not be opened anew, which the next one to want it tries again.
    database: Mutex<Option<Database>>,
}

impl Meta {
    pub(super) fn open(backend: Backend) -> Result<Self, MetaError> {
        let meta = Self { backend: Arc::new(backend), database: Mutex::new(None) };
        // So that reading finds them.
        meta.change(|_, _| Ok(Needs::Nothing))?;
        Ok(meta)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Database>> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened<'a>(&self, database: &'a mut Option<Database>) -> Result<&'a Database, MetaError> {
        let found = match database.take() {
            Some(found) => found,
            None => {
                let backend = Lent(self.backend.clone());
                Database::builder().set_cache_size(CACHE).create_with_backend(backend).map_err(failed)?
            }
        };
        Ok(database.insert(found))
    }

    fn change(
        &self,
        change: impl FnOnce(
            &mut redb::Table<'_, &str, u64>,
            &mut redb::Table<'_, u64, &[u8]>,
        ) -> Result<Needs, redb::StorageError>,
    ) -> Result<(), MetaError> {
        let mut database = self.lock();
        let done = (|| {
            let transaction = self.opened(&mut database)?.begin_write().map_err(failed)?;
            let needs = {
                let mut names = transaction.open_table(NAMES).map_err(failed)?;
                let mut files = transaction.open_table(FILES).map_err(failed)?;
                change(&mut names, &mut files).map_err(failed)?
            };
            if needs == Needs::Room {
                // What a transaction takes and gives back is free at once.
                let mut spare = transaction.open_table(SPARE).map_err(failed)?;
                spare.insert((), [0; SPARE_BYTES].as_slice()).map_err(failed)?;
                spare.remove(()).map_err(failed)?;
            }
            transaction.commit().map_err(failed)
        })();
        if done.is_err() && self.backend.take_outgrown() {
            // It would refuse everything from now on. Nothing of the change was committed.
            *database = None;
            return Err(MetaError::Full { room: ByteSize::new(self.backend.table_room()) });
        }
        done
    }

    /// Every file: its name, its number and what is known of it.
    pub(super) fn files(&self) -> Result<Vec<(String, u64, Record)>, MetaError> {
        let mut database = self.lock();
        let transaction = self.opened(&mut database)?.begin_read().map_err(failed)?;
        let names = transaction.open_table(NAMES).map_err(failed)?;
        let files = transaction.open_table(FILES).map_err(failed)?;
        let corrupted = |name: &str| {
            failed(redb::StorageError::Corrupted(format!("the record of the file {name:?} makes no sense")))
        };
        let mut found = Vec::new();
        for entry in names.iter().map_err(failed)? {
            let (name, inode) = entry.map_err(failed)?;
            let (name, inode) = (name.value(), inode.value());
            // Behind the last number there is none for another file.
            let record = files.get(inode).map_err(failed)?.filter(|_| inode < u64::MAX);
            let record =
                record.and_then(|bytes| Record::decode(bytes.value())).ok_or_else(|| corrupted(name))?;
            found.push((name.to_owned(), inode, record));
        }
        Ok(found)
    }

    /// A new file.
    pub(super) fn create(&self, name: &str, inode: u64, record: &Record) -> Result<(), MetaError> {
        self.change(|names, files| {
            names.insert(name, inode)?;
            files.insert(inode, record.encode().as_slice())?;
            Ok(Needs::Room)
        })
    }

    /// No such file any more.
    pub(super) fn remove(&self, name: &str, inode: u64) -> Result<(), MetaError> {
        self.change(|names, files| {
            names.remove(name)?;
            files.remove(inode)?;
            Ok(Needs::Nothing)
        })
    }

    /// A file as it is from now on.
    pub(super) fn update(&self, inode: u64, record: &Record) -> Result<(), MetaError> {
        self.change(|_, files| {
            let bytes = record.encode();
            let before = files.insert(inode, bytes.as_slice())?.map_or(0, |before| before.value().len());
            Ok(if bytes.len() > before { Needs::Room } else { Needs::Nothing })
        })
    }
}
