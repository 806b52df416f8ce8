//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use uhmm_addr::ByteSize;

use crate::dax::DaxVerb;

/// Runs programs in less memory than they need: what is cold lives on a device and comes back when touched.
#[derive(Parser, Debug)]
#[command(name = "uhmm", version, about, after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  uhmm run --ram 64MiB -- sh -c 'seq 3000000 | sort -r -S 1G | md5sum'
  uhmm run --ram 2G --device 'file:/nvme/far.img?size=64GiB' -- ./prog --its own
  uhmm doctor
  uhmm bench fault-signal --json
  uhmm dax create /dev/hugepages/pool --capacity 2G --size 1G --align 2M";

const DAX_EXAMPLES: &str = "\
Examples:
  uhmm dax create pmem.img --capacity 1G --size 256M --align 2M --name logs
  uhmm dax list pmem.img --json --mappings
  uhmm dax resize pmem.img dax0.0 512M
  uhmm dax inject-error pmem.img dax0.0 --offset 4K
  uhmm dax clear-error pmem.img dax0.0

Exit codes: 2 what was asked for cannot be, 1 it failed: in use, full, labels lost, no huge pages.";

const RUN_EXAMPLES: &str = "\
Devices:
  file:                       an unlinked temporary file in $TMPDIR or /var/tmp (the default)
  file:/path?size=64GiB       a regular file, made if it is not there, or a block device
  mem:1GiB                    memory of this machine that the budget does not count

Examples:
  uhmm run --ram 64MiB -- sort -S 1G big.txt
  uhmm run --ram 512MiB --device mem:4GiB --stats stats.json -- python3 job.py

Exit codes: the program's own; 127 it does not exist, 126 it cannot be executed, 2 what was asked for cannot be,
1 uhmm failed. A program that ends by a signal ends uhmm by the same.";

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Run a program with its cold memory on a device
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Say what this machine and user can do, and what would grant the rest
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure uhmm against the limits of this machine
    Bench {
        /// Which rows; all without any
        rows: Vec<String>,
        /// Little of everything: whether the rows work and move the right bytes, no figures to trust
        #[arg(long)]
        quick: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Divide a file or huge pages into namespaces that are mapped directly
    #[command(after_help = DAX_EXAMPLES)]
    Dax {
        #[command(subcommand)]
        verb: DaxVerb,
    },
    /// Write the manual pages into a directory
    Man {
        /// Where; it is made if it is not there
        directory: PathBuf,
    },
}

/// `uhmm run`.
#[derive(clap::Args, Debug)]
pub(crate) struct RunArgs {
    /// How much anonymous memory each process may keep in RAM, such as 64MiB or 2G; at least 4MiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) ram: ByteSize,
    /// Where the rest goes: file:, file:/path?size=64GiB, mem:1GiB
    #[arg(long, value_name = "URL", default_value = "file:")]
    pub(crate) device: String,
    /// Write statistics to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,
    /// No line at the end
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Run programs that cannot be helped (static, setuid) as they are
    #[arg(long)]
    pub(crate) best_effort: bool,
    /// Act as if the kernel could not move pages (for tests)
    #[arg(long, hide = true)]
    pub(crate) force_fallback: bool,
    /// Do not keep device copies of pages that are only read (for tests)
    #[arg(long, hide = true)]
    pub(crate) no_track: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    pub(crate) command: Vec<OsString>,
}
