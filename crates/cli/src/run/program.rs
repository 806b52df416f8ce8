//! What would be executed, and whether it can be helped.
//!
//! What     [`find`], which looks a program up exactly as `execvp` does; [`inspect`], which looks into it and
//!          follows scripts to their interpreters.
//! Why      a program that does not load libraries never loads the agent: it would run as if uhmm were not
//!          there, and nobody would notice.
//! Fails    [`ProgramError`]: not found, or not executable. Whatever the bytes, never by a panic.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use rustix::io::Errno;

/// As the C library has it when there is none.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// Files that the kernel looks into for one program: it, its interpreter, the interpreter of that, and so on.
const DEPTH: usize = 6;
/// The first line of a script, as far as the kernel reads it.
const LINE: usize = 256;

/// Why a program cannot be started.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    /// No such file.
    #[error("{0:?} does not exist; check its name and $PATH")]
    NotFound(PathBuf),
    /// There, and not executable.
    #[error("{0:?} cannot be executed: {1}")]
    NotExecutable(PathBuf, String),
}

/// Why uhmm cannot help a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Helpless {
    /// No dynamic loader.
    #[error("it is static, and the agent cannot be loaded into it")]
    Static,
    /// Runs with another user's rights.
    #[error("it is setuid or setgid, and the system loads nothing foreign into it")]
    Setuid,
    /// Runs with more rights than its user.
    #[error("it has file capabilities, and the system loads nothing foreign into it")]
    Capabilities,
    /// Of another kind of machine.
    #[error("it is not a 64-bit x86 program, and the agent cannot be loaded into it")]
    Foreign,
}

/// A program that can be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Program {
    /// What to execute.
    pub(crate) path: PathBuf,
    /// The file that decides (an interpreter, for a script), and why it cannot be helped, if so.
    pub(crate) helpless: Option<(PathBuf, Helpless)>,
}

/// Looks `name` up in `path` as `execvp` does, and inspects what it finds.
pub(crate) fn find(name: &OsStr, path: Option<OsString>) -> Result<Program, ProgramError> {
    let not_found = || ProgramError::NotFound(name.into());
    if name.is_empty() {
        return Err(not_found());
    }
    if name.as_bytes().contains(&b'/') {
        return inspect(Path::new(name));
    }
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    let mut refused = None;
    for directory in path.as_bytes().split(|byte| *byte == b':') {
        let directory = if directory.is_empty() { b"." } else { directory };
        match inspect(&Path::new(OsStr::from_bytes(directory)).join(name)) {
            // As `execvp`: what may not be executed does not hide what may.
            Err(ProgramError::NotExecutable(path, why)) => {
                refused.get_or_insert(ProgramError::NotExecutable(path, why));
            }
            Err(ProgramError::NotFound(_)) => {}
            found => return found,
        }
    }
    Err(refused.unwrap_or_else(not_found))
}

/// Looks into the program at `path`.
pub(crate) fn inspect(path: &Path) -> Result<Program, ProgramError> {
    let mut at = path.to_path_buf();
    for depth in 0..DEPTH {
        let metadata = executable(&at).map_err(|error| match error {
            ProgramError::NotFound(interpreter) if depth > 0 => {
                let why = format!("its interpreter {interpreter:?} does not exist");
                ProgramError::NotExecutable(path.into(), why)
            }
            other => other,
        })?;
        let helpless = |why| Ok(Program { path: path.into(), helpless: Some((at.clone(), why)) });
        // Of a script, the kernel ignores these bits.
        let image = match image(&at) {
            Ok(image) => image,
            // It may be executable and not readable; then it cannot be looked into, only tried.
            Err(_) => return Ok(Program { path: path.into(), helpless: None }),
        };
        match image {
            Image::Script(interpreter) => at = interpreter,
            Image::Static => return helpless(Helpless::Static),
            Image::Foreign => return helpless(Helpless::Foreign),
            Image::Dynamic if metadata.mode() & 0o6000 != 0 => return helpless(Helpless::Setuid),
            Image::Dynamic if has_capabilities(&at) => return helpless(Helpless::Capabilities),
            Image::Dynamic => return Ok(Program { path: path.into(), helpless: None }),
        }
    }
    Err(ProgramError::NotExecutable(path.into(), "too many interpreters of interpreters".into()))
}

fn executable(path: &Path) -> Result<Metadata, ProgramError> {
    let refused = |why: &dyn ToString| ProgramError::NotExecutable(path.into(), why.to_string());
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            return Err(match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::NOTDIR) => ProgramError::NotFound(path.into()),
                _ => refused(&error),
            });
        }
    };
    if metadata.is_dir() {
        return Err(refused(&"it is a directory"));
    }
    if !metadata.is_file() {
        return Err(refused(&"it is no regular file"));
    }
    match rustix::fs::access(path, Access::EXEC_OK) {
        Ok(()) => Ok(metadata),
        Err(Errno::ACCESS) => Err(refused(&"permission denied; chmod +x would make it executable")),
        Err(errno) => Err(refused(&errno)),
    }
}

fn has_capabilities(path: &Path) -> bool {
    let mut value = [0_u8; 64];
    rustix::fs::getxattr(path, "security.capability", &mut value[..]).is_ok_and(|len| len > 0)
}

/// What a file is to exec.
#[derive(PartialEq, Eq, Debug)]
enum Image {
    Script(PathBuf),
    Dynamic,
    Static,
    Foreign,
}

fn image(path: &Path) -> std::io::Result<Image> {
    let mut head = Vec::new();
    let file = File::open(path)?;
    (&file).take(LINE as u64).read_to_end(&mut head)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        return Ok(interpreter(line).map_or(Image::Foreign, Image::Script));
    }
    if !head.starts_with(b"\x7fELF") {
        // The C library gives what the kernel does not know to the shell.
        return Ok(Image::Script("/bin/sh".into()));
    }
    Ok(elf(&head, |buffer, offset| file.read_exact_at(buffer, offset).is_ok()))
}

fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let name = line.split(|byte| matches!(byte, b' ' | b'\t')).find(|word| !word.is_empty())?;
    Some(OsStr::from_bytes(name).into())
}

/// Whether an ELF file names a dynamic loader. `read` reads at an offset of the file.
fn elf(head: &[u8], read: impl Fn(&mut [u8], u64) -> bool) -> Image {
    const CLASS_64: u8 = 2;
    const LITTLE: u8 = 1;
    const X86_64: u16 = 62;
    const INTERP: u32 = 3;
    let half = |at: usize| head.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let word = |at: usize| {
        let bytes = head.get(at..at + 8)?;
        Some(u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]))
    };
    if head.get(4) != Some(&CLASS_64) || head.get(5) != Some(&LITTLE) || half(18) != Some(X86_64) {
        return Image::Foreign;
    }
    let (Some(table), Some(size), Some(count)) = (word(32), half(54), half(56)) else {
        return Image::Foreign;
    };
    for n in 0..count {
        let mut kind = [0; 4];
        let at = table.checked_add(u64::from(n) * u64::from(size));
        if !at.is_some_and(|at| read(&mut kind, at)) {
            return Image::Foreign;
        }
        if u32::from_le_bytes(kind) == INTERP {
            return Image::Dynamic;
        }
    }
    Image::Static
}

#[cfg(test)]
mod tests;
