//! One scenario, step by step.
//!
//! What    [`play`]: carries out what is asked and prints a line for each step. [`touch`], a program's loads and stores.
//! Text    a page is told by its sum in hexadecimal, `0` for one of zeros, `segv` or `bus` for one that cannot be
//!         touched; a call by what it answers or `errno N`; a snapshot by its bytes.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::child::Child;
use crate::device::{Answer, Device, PRIVATE};
use crate::layout::Layout;
use crate::memory::{Errno, Memory, PAGE, Touched, sum, words};
use crate::operation::{Operation, Pages, Request};
use crate::random::mix;
use crate::scenario::{devices_of, has_coherent, of_seed};

/// `HMM_DMIRROR_PROT_WRITE`.
const WRITABLE: u8 = 2;

/// What there is while a scenario is played.
struct Stage {
    memory: Memory,
    /// By number; `None` if it could not be opened.
    devices: Vec<(u64, Option<Device>)>,
    child: Option<Child>,
}

/// Plays the first `steps` steps of the scenario of `seed`.
pub(crate) fn play(seed: u64, steps: usize) {
    let mut stage = match Stage::new(seed) {
        Ok(stage) => stage,
        Err((what, Errno(number))) => return say(&format!("{seed} - {what} | errno {number}")),
    };
    let mut layout = Layout::new(has_coherent(seed));
    for (step, operation) in of_seed(seed).into_iter().enumerate().take(steps) {
        let marks = operation.pages().map_or_else(String::new, |pages| format!(" [{}]", layout.marks(pages)));
        let result = stage.carry_out(operation, mix(seed) ^ step as u64);
        layout.apply(&operation);
        say(&format!("{seed} {step} {operation}{marks} | {result}"));
    }
    // Nothing of this seed is there when the next one begins.
    if let Some(child) = stage.child.take() {
        child.exit();
    }
}

/// One write for a line, so that it is there whatever comes next.
fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

impl Stage {
    fn new(seed: u64) -> Result<Self, (String, Errno)> {
        let memory = Memory::new().map_err(|error| ("signals".to_owned(), error))?;
        let open = |number: &u64| match Device::open(*number) {
            Ok(device) => Ok((*number, Some(device))),
            Err(error) => Err((format!("open dev{number}"), error)),
        };
        let devices: Result<_, _> = devices_of(seed).iter().map(open).collect();
        Ok(Self { memory, devices: devices?, child: None })
    }

    fn carry_out(&mut self, operation: Operation, tag: u64) -> String {
        match operation {
            Operation::Map(kind, pages) => plain(self.memory.map(kind, pages)),
            Operation::Unmap(pages) => plain(self.memory.unmap(pages)),
            Operation::Protect(protection, pages) => plain(self.memory.protect(protection, pages)),
            Operation::Discard(pages) => plain(self.memory.discard(pages)),
            Operation::Read(pages) => touch(&mut self.memory, pages, None),
            Operation::Write(pages) => touch(&mut self.memory, pages, Some(tag)),
            Operation::Device { request, device, pages, nowhere } => {
                let home = device < PRIVATE && matches!(request, Request::Read | Request::Write);
                let Some(Some(device)) = self.device(device) else { return "not open".into() };
                let mut text = String::new();
                if home {
                    text = told(Request::Back, device.ask(Request::Back, pages, false, None)) + "; ";
                }
                let data = (request == Request::Write).then(|| pattern(pages, tag));
                text += &told(request, device.ask(request, pages, nowhere, data));
                if matches!(request, Request::Migrate | Request::Back) {
                    text + &seen(device, pages)
                } else {
                    text
                }
            }
            Operation::Use { write, device, pages } => {
                self.bring_home(pages);
                let Some(Some(device)) = self.device(device) else { return "not open".into() };
                use_pages(device, pages, write.then_some(tag))
            }
            Operation::Reopen(number) => match self.device(number) {
                Some(device) => {
                    // Closed first.
                    *device = None;
                    let opened = Device::open(number);
                    plain(opened.map(|opened| *device = Some(opened)))
                }
                None => "not open".into(),
            },
            Operation::Fork => {
                let devices: Vec<&Device> =
                    self.devices.iter().filter_map(|(_, device)| device.as_ref()).collect();
                let forked = Child::fork(&mut self.memory, &devices);
                plain(forked.map(|child| self.child = Some(child)))
            }
            Operation::ChildRead(pages) => self.child_touches(pages, None),
            Operation::ChildWrite(pages) => self.child_touches(pages, Some(tag)),
            Operation::ChildExit => self.child.take().map_or_else(|| "no child".into(), Child::exit),
        }
    }

    /// Has every page of `pages` in RAM, and no device's alone: a device's table may have forgotten what it has.
    fn bring_home(&self, pages: Pages) {
        for page in pages.first..pages.first + pages.count {
            let _ = self.memory.read(page);
        }
        for (_, device) in &self.devices {
            let _ = device.as_ref().map(|device| device.ask(Request::Back, pages, false, None));
        }
    }

    fn device(&mut self, number: u64) -> Option<&mut Option<Device>> {
        self.devices.iter_mut().find(|(known, _)| *known == number).map(|(_, device)| device)
    }

    fn child_touches(&mut self, pages: Pages, tag: Option<u64>) -> String {
        let Some(child) = &mut self.child else { return "no child".into() };
        child.touch(pages, tag).unwrap_or_else(|| "no answer".into())
    }
}

/// What the device sees of `pages`, as the rest of a result.
fn seen(device: &Device, pages: Pages) -> String {
    format!("; {}", told(Request::Snapshot, device.ask(Request::Snapshot, pages, false, None)))
}

/// The device gets `pages` and, if it has them all, reads them or writes what follows from `tag`.
fn use_pages(device: &Device, pages: Pages, tag: Option<u64>) -> String {
    let ask = |request, data| device.ask(request, pages, false, data);
    let migrated = ask(Request::Migrate, None);
    let there = migrated.done.is_ok();
    let text = told(Request::Migrate, migrated);
    if !there {
        return text + &seen(device, pages);
    }
    let (request, data) = match tag {
        None => (Request::Read, None),
        Some(tag) => {
            let seen = ask(Request::Snapshot, None).data.unwrap_or_default();
            if !seen.iter().all(|byte| *byte != 0xff && byte & WRITABLE != 0) {
                return text + "; not all to be written";
            }
            (Request::Write, Some(pattern(pages, tag)))
        }
    };
    format!("{text}; {}", told(request, ask(request, data)))
}

fn plain(done: Result<(), Errno>) -> String {
    match done {
        Ok(()) => "ok".into(),
        Err(Errno(number)) => format!("errno {number}"),
    }
}

/// What a request came to.
fn told(request: Request, answer: Answer) -> String {
    let mut text = match answer.done {
        Ok((pages, faults)) => format!("ok pages {pages} faults {faults}"),
        Err(Errno(number)) => format!("errno {number}"),
    };
    if let Some(data) = answer.data {
        text += " data";
        for part in data.chunks(if request == Request::Snapshot { 1 } else { PAGE }) {
            let value = if request == Request::Snapshot { u64::from(part[0]) } else { sum(words(part)) };
            let _ = write!(text, " {value:x}");
        }
    }
    text
}

/// What a device is given to write.
fn pattern(pages: Pages, tag: u64) -> Vec<u8> {
    let word = |n: u64| mix(tag ^ mix(n)).to_ne_bytes();
    (0..pages.count * PAGE as u64 / 8).flat_map(word).collect()
}

/// The program reads `pages`, or writes what follows from `tag`, page by page.
pub(crate) fn touch(memory: &mut Memory, pages: Pages, tag: Option<u64>) -> String {
    let mut text = Vec::new();
    for page in pages.first..pages.first + pages.count {
        let touched = match tag {
            Some(tag) => match memory.write(page, tag) {
                Touched::Done => Ok("ok".to_owned()),
                failed => Err(failed),
            },
            None => memory.read(page).map(|sum| format!("{sum:x}")),
        };
        text.push(touched.unwrap_or_else(|failed| match failed {
            Touched::Signal(libc::SIGSEGV) => "segv".into(),
            Touched::Signal(libc::SIGBUS) => "bus".into(),
            other => format!("{other:?}"),
        }));
    }
    text.join(" ")
}
