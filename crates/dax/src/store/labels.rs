//! The labels of a store: two copies, of which one is always whole.
//!
//! What     [`Labels`], in the bytes of an [`Area`]: it reads the newest whole copy and writes the
//!          other one.
//! Why      power may fail in the middle of a write, and a medium tears a write between sectors. The copy that is
//!          in force is never written; a new label goes over the other one and is in force from the moment at
//!          which its checksum holds. So what is read is the state before a change or the state after it.
//! Order    write, then sync; a change is done when the sync has returned. When either fails, the copy is blanked, so
//!          that one that only a cache holds is not taken for safe. That may fail too: the labels must be read again,
//!          and either state may be there.
//! Fails    [`LabelsError`]. With no whole copy nothing is read and nothing is written: formatting is for blank
//!          areas alone.

use std::io;

use super::label::{COPY_BYTES, Label, LabelFault, TooLong, decode, encode};
use super::{Area, Table};

/// Bytes for labels at the front of a store.
pub const AREA_BYTES: u64 = 2 * COPY_BYTES as u64;

/// Why there are no labels, or no new ones.
#[derive(Debug, thiserror::Error)]
pub enum LabelsError {
    /// Nothing was ever written there.
    #[error("it holds no labels")]
    Blank,
    /// Neither copy can be used.
    #[error(
        "neither copy of its labels can be used: the first is {first}; the second is {second}. Nothing was changed"
    )]
    Lost {
        /// What is wrong with the first.
        first: LabelFault,
        /// And with the second.
        second: LabelFault,
    },
    /// The other copy is a newer version's, and a change would overwrite it.
    #[error(
        "one copy of its labels is of version {found}, which a newer uhmm wrote; change the store with that one"
    )]
    Newer {
        /// The version.
        found: u32,
    },
    /// No label can be told to be newer than these (`u64::MAX` of them were written, or somebody says so).
    #[error(
        "its labels have the sequence {sequence}, which no newer ones can follow; copy what it holds to another store"
    )]
    Exhausted {
        /// The number of the labels in force.
        sequence: u64,
    },
    /// They have no room for more.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The medium failed.
    #[error("its labels cannot be read or written: {0}")]
    Io(#[from] io::Error),
}

/// What was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Labels {
    label: Label,
    /// Which copy it is: 0 or 1.
    copy: u64,
    /// What is wrong with the other one. An old whole one is nothing to speak of.
    other: Option<LabelFault>,
}

impl Labels {
    /// Reads both copies, and takes the newest that is whole.
    pub fn read(area: &dyn Area) -> Result<Self, LabelsError> {
        let mut bytes = vec![0; COPY_BYTES];
        let mut copy = |number: u64| {
            area.read(number * COPY_BYTES as u64, &mut bytes)
                .map_err(|error| LabelFault::Unreadable(error.kind()))
                .and_then(|()| decode(&bytes))
        };
        match (copy(0), copy(1)) {
            (Ok(first), Ok(second)) => {
                let newer = u64::from(second.sequence > first.sequence);
                let label = if newer == 1 { second } else { first };
                Ok(Self { label, copy: newer, other: None })
            }
            (Ok(label), Err(fault)) => Ok(Self { label, copy: 0, other: Some(fault) }),
            (Err(fault), Ok(label)) => Ok(Self { label, copy: 1, other: Some(fault) }),
            (Err(LabelFault::Blank), Err(LabelFault::Blank)) => Err(LabelsError::Blank),
            (Err(first), Err(second)) => Err(LabelsError::Lost { first, second }),
        }
    }

    /// Writes the first labels of a blank area.
    pub fn format(area: &dyn Area, table: Table) -> Result<Self, LabelsError> {
        match Self::read(area) {
            Err(LabelsError::Blank) => {}
            Err(error) => return Err(error),
            Ok(_) => return Err(io::Error::from(io::ErrorKind::AlreadyExists).into()),
        }
        let mut labels = Self { label: Label { sequence: 0, table }, copy: 1, other: None };
        let table = labels.label.table.clone();
        labels.write(area, table)?;
        Ok(labels)
    }

    /// Puts `table` in force, by the copy that is not.
    pub fn write(&mut self, area: &dyn Area, table: Table) -> Result<(), LabelsError> {
        self.changeable()?;
        let label = Label { sequence: self.next()?, table };
        let bytes = encode(&label)?;
        let copy = 1 - self.copy;
        let at = copy * COPY_BYTES as u64;
        if let Err(error) = area.write(at, &bytes).and_then(|()| area.sync()) {
            let _ = area.write(at, &[0; 512]);
            return Err(error.into());
        }
        *self = Self { label, copy, other: None };
        Ok(())
    }

    /// Whether there may be new ones: not over a newer version's, and not behind the last number.
    pub fn changeable(&self) -> Result<(), LabelsError> {
        match self.other {
            Some(LabelFault::Newer { found }) => Err(LabelsError::Newer { found }),
            _ => self.next().map(drop),
        }
    }

    /// The next label's number. The last of all is no label's, so that what is read can always be told from what follows.
    fn next(&self) -> Result<u64, LabelsError> {
        let sequence = self.label.sequence;
        let next = sequence.checked_add(1).filter(|next| *next < u64::MAX);
        next.ok_or(LabelsError::Exhausted { sequence })
    }

    /// What they say.
    pub fn table(&self) -> &Table {
        &self.label.table
    }

    /// How many labels were written before.
    pub fn sequence(&self) -> u64 {
        self.label.sequence
    }

    /// What is wrong with the copy that is not in force, if anything.
    pub fn other(&self) -> Option<&LabelFault> {
        self.other.as_ref()
    }
}
