//! `uhmm man`: the manual pages, made from the command line's own description.
//!
//! What     one page for `uhmm` and one for each verb, `uhmm-dax-create.1` among them.
//! Fails    if a page cannot be written.

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::args::Args;
use crate::exit::{End, Failure};

/// Writes every page into `directory`, which is made if it is not there.
pub(crate) fn man(directory: &Path) -> Result<End, Failure> {
    let failed = |error| Failure::Failed(format!("{}: {error}", directory.display()));
    fs::create_dir_all(directory).map_err(failed)?;
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    page(directory, &command, "uhmm").map_err(failed)?;
    Ok(End::Done)
}

fn page(directory: &Path, command: &Command, name: &str) -> std::io::Result<()> {
    // Clap keeps names for ever; these few are made once.
    let whole: &'static str = String::leak(name.to_owned());
    let mut text = Vec::new();
    Man::new(command.clone().name(whole)).render(&mut text)?;
    fs::write(directory.join(format!("{name}.1")), text)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        page(directory, verb, &format!("{name}-{}", verb.get_name()))?;
    }
    Ok(())
}
