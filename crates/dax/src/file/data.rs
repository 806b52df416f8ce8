//! What is done with one file.
//!
//! What     [`DaxFile`]'s methods, and [`PinnedFile`].
//! Order    bytes are copied with references to their pages and without a lock: a truncation waits for that, and a
//!          buffer that is a mapping of the same file makes nobody wait for himself.

use std::sync::{Arc, MutexGuard};

use uhmm_addr::PAGE_SIZE;
use uhmm_core::pagemap::PageRange;
use uhmm_sys::dax::Protection;

use super::change::Which;
use super::layout::Patience;
use super::runs::Run;
use super::view::{FileMapping, View};
use super::{Body, DaxFile, FileError, FileLoss, SIZE_MAX, State};
use crate::pin::pin;
use crate::store::Extent;

const PAGE: u64 = PAGE_SIZE as u64;

/// Pages of a file that stay where they are as long as this lives: nothing that would take them away happens before.
#[derive(Debug)]
pub struct PinnedFile {
    _ranges: Vec<PageRange>,
}

impl DaxFile {
    fn body(&self) -> &Body {
        &self.inner.body
    }

    fn which(&self) -> Which<'_> {
        Which { inode: self.inode, name: &self.name }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length in bytes.
    pub fn size(&self) -> Result<u64, FileError> {
        Ok(self.body().lock().record(self.which())?.size)
    }

    /// Bytes that it takes, those that it shares included.
    pub fn allocated(&self) -> Result<u64, FileError> {
        let state = self.body().lock();
        let blocks: u64 = state.record(self.which())?.runs.iter().map(|run| run.len).sum();
        Ok(blocks * self.body().blocks.bytes())
    }

    /// Reads up to `into.len()` bytes from `offset` on; fewer at the file's end. Says how many.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<usize, FileError> {
        let body = self.body();
        let state = body.lock();
        let record = state.record(self.which())?;
        let len = record.size.saturating_sub(offset).min(into.len() as u64);
        if len == 0 {
            return Ok(0);
        }
        let pieces = self.pieces(&state, offset, len)?;
        let bad = pieces.iter().find_map(|piece| {
            let bad = Body::bad_among(&state, piece.at, piece.len)?;
            Some(offset + piece.skip + (bad.start * PAGE).saturating_sub(piece.at))
        });
        if let Some(bad) = bad {
            return Err(FileError::Poisoned { offset: bad / PAGE * PAGE });
        }
        let held = self.refer(&pieces)?;
        drop(state);
        into[..len as usize].fill(0);
        for piece in &pieces {
            let part = piece.skip as usize..(piece.skip + piece.len) as usize;
            body.blocks.read(piece.at, &mut into[part])?;
        }
        drop(held);
        Ok(len as usize)
    }

    /// Writes `bytes` from `offset` on, and returns when they are safe. The file grows as far as that; pages that were bad
    /// are good again if they are written whole.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), FileError> {
        let (body, len) = (self.body(), bytes.len() as u64);
        let end = offset.checked_add(len).filter(|end| *end <= SIZE_MAX);
        let end = end.ok_or(FileError::TooLong { offset, len })?;
        if len == 0 {
            return Ok(());
        }
        let mut state = body.lock();
        if state.record(self.which())?.size < offset {
            body.lengthen(&mut state, self.which(), offset)?;
        }
        self.mend(&mut state, offset, end)?;
        let block = body.blocks.bytes();
        body.provide(&mut state, self.which(), (offset / block, end.div_ceil(block)), true)?;
        let pieces = self.pieces(&state, offset, len)?;
        let held = self.refer(&pieces)?;
        drop(state);
        for piece in &pieces {
            body.blocks.write(piece.at, &bytes[piece.skip as usize..(piece.skip + piece.len) as usize])?;
            body.blocks.flush(piece.at, piece.len)?;
        }
        let mut state = body.lock();
        let mut record = state.record(self.which())?.clone();
        if record.size < end {
            record.size = end;
            body.meta.update(self.inode, &record)?;
            state.files.insert(self.inode, record);
        }
        drop(state);
        drop(held);
        Ok(())
    }

    /// Makes bad pages good that are going to be written whole; fails for others among `offset..end`.
    fn mend(&self, state: &mut MutexGuard<'_, State>, offset: u64, end: u64) -> Result<(), FileError> {
        let body = self.body();
        let whole = Extent::between(offset.div_ceil(PAGE) * PAGE, end / PAGE * PAGE);
        loop {
            let pieces = self.pieces(state, offset, end - offset)?;
            let found =
                pieces.iter().find_map(|piece| Some((piece, Body::bad_among(state, piece.at, piece.len)?)));
            let Some((piece, bad)) = found else { break };
            let (at, len) = (bad.start * PAGE, bad.len * PAGE);
            let in_file = (offset + piece.skip + at).saturating_sub(piece.at);
            let inside = whole.is_some_and(|whole| whole.start <= in_file && in_file + len <= whole.end());
            let Some((store, claim)) = body.blocks.source.store.as_ref().filter(|_| inside) else {
                return Err(FileError::Poisoned { offset: in_file });
            };
            body.blocks.zero(at, len)?;
            store.mark(claim.namespace().id, at, len, false)?;
            body.follow(state)?;
        }
        Ok(())
    }

    /// Makes the file `size` bytes long. What it loses is gone when nobody uses its pages any more, which is waited for with
    /// `patience`; what it gains reads as zeros.
    pub fn truncate(&self, size: u64, patience: &Patience) -> Result<(), FileError> {
        self.body().truncate(self.which(), size, patience)
    }

    /// Makes `len` bytes from `offset` on read as zeros, and gives whole blocks of them back, when nobody uses their
    /// pages any more.
    pub fn punch_hole(&self, offset: u64, len: u64, patience: &Patience) -> Result<(), FileError> {
        self.body().punch(self.which(), offset, len, patience)
    }

    /// A new file with the same contents, which takes no space until one of the two is written.
    pub fn reflink(&self, name: &str, patience: &Patience) -> Result<Self, FileError> {
        let inode = self.body().reflink(self.which(), name, patience)?;
        Ok(Self { inner: self.inner.clone(), inode, name: name.to_owned() })
    }

    /// Keeps the pages of `len` bytes from `offset` on where they are, for a transfer behind the page table's back. For one
    /// that writes them, `write` gives the file blocks of its own.
    #[track_caller]
    pub fn pin(&self, offset: u64, len: u64, write: bool) -> Result<PinnedFile, FileError> {
        let body = self.body();
        let mut state = body.lock();
        let size = state.record(self.which())?.size;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(FileError::Outside { offset, len, size });
        }
        let block = body.blocks.bytes();
        body.provide(&mut state, self.which(), (offset / block, (offset + len).div_ceil(block)), write)?;
        Ok(PinnedFile { _ranges: self.refer(&self.pieces(&state, offset, len)?)? })
    }

    /// Maps `len` bytes from `offset` on, both multiples of the block. Every block as far as the file's end is there then;
    /// behind it a touch raises SIGBUS, until the file grows.
    pub fn map(&self, offset: u64, len: u64, protection: Protection) -> Result<FileMapping, FileError> {
        let body = self.body();
        let block = body.blocks.bytes();
        let wrong = |value: u64| !value.is_multiple_of(block);
        for (what, value, wrong) in
            [("offset", offset, wrong(offset)), ("length", len, wrong(len) || len == 0)]
        {
            if wrong {
                return Err(FileError::Misaligned { what, value, block });
            }
        }
        let end = offset.checked_add(len).filter(|end| *end <= SIZE_MAX);
        let end = end.ok_or(FileError::TooLong { offset, len })?;
        let mut state = body.lock();
        let reached = state.record(self.which())?.size.div_ceil(block).min(end / block);
        let first = offset / block;
        if first < reached {
            body.provide(&mut state, self.which(), (first, reached), protection == Protection::ReadWrite)?;
        }
        let view = Arc::new(View::new(&body.blocks, self.inode, first, len / block, protection)?);
        // Known before it shows anything, so that no page is lost unnoticed.
        body.driver.add(&view);
        for run in state.record(self.which())?.runs.within(first, reached.max(first)) {
            view.show(run.at, run.block, run.len)?;
        }
        Ok(FileMapping::new(&self.inner, view)?)
    }

    /// `len` bytes from `offset` on, whole pages, are bad from now on. Says whose they are: a shared block is several files'.
    pub fn inject_error(&self, offset: u64, len: u64) -> Result<FileLoss, FileError> {
        let body = self.body();
        let mut state = body.lock();
        let size = state.record(self.which())?.size;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(FileError::Outside { offset, len, size });
        }
        let Some((store, claim)) = &body.blocks.source.store else {
            return Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into());
        };
        for piece in self.pieces(&state, offset, len)? {
            store.mark(claim.namespace().id, piece.at, piece.len, true)?;
        }
        Ok(body.follow(&mut state)?)
    }

    /// Where `len` bytes from `offset` on are; holes are left out.
    fn pieces(&self, state: &State, offset: u64, len: u64) -> Result<Vec<Piece>, FileError> {
        let block = self.body().blocks.bytes();
        let end = offset + len;
        let runs = state.record(self.which())?.runs.within(offset / block, end.div_ceil(block));
        let piece = |run: Run| {
            let (from, to) = ((run.at * block).max(offset), ((run.at + run.len) * block).min(end));
            Piece { skip: from - offset, at: run.block * block + (from - run.at * block), len: to - from }
        };
        Ok(runs.map(piece).collect())
    }

    /// References to the pages of pieces.
    fn refer(&self, pieces: &[Piece]) -> Result<Vec<PageRange>, FileError> {
        let blocks = &self.body().blocks;
        let block = blocks.bytes();
        let mut held = Vec::new();
        for piece in pieces {
            let (first, end) = (piece.at / block, (piece.at + piece.len).div_ceil(block));
            for range in blocks.pfns(first, end - first) {
                held.push(pin(&blocks.pagemap, range)?);
            }
        }
        Ok(held)
    }
}

/// Bytes of a file that lie together.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// How many bytes of what was asked for come before.
    skip: u64,
    /// The first byte, counted from the namespace's first.
    at: u64,
    /// How many.
    len: u64,
}
