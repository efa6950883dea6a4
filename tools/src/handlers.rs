//! `mason get`, `mason set` and `mason call`: the handlers of running elements.

use crate::control::client::{Client, path};
use crate::control::find::{self, ControlArgs};
use crate::failure::{Failure, Outcome};
use crate::output::{self, printable};
use crate::view::{GraphSummary, HandlerArgument, HandlerValue, HandlerView};

/// Read handlers of a running graph: one, those of one element, or all.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason get Limit.rate
  mason get Limit                     every handler of the element that can be read
  mason get                           those of every element
  mason get --graph vm1 Limit.rate --json

`mason elements TYPE` says what the handlers of a type mean.")]
pub(crate) struct GetArgs {
    /// An element's handler, or an element
    #[arg(value_name = "ELEMENT[.HANDLER]")]
    handler: Option<String>,

    #[command(flatten)]
    which: WhichArgs,
}

/// Set a handler of a running element.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason set Limit.rate 50M/s
  mason set --graph vm1 Faulty.probability 0.1%

When it returns, the new value counts. A handler with the name of a parameter is that parameter: it is as if
the graph had been written so. The graph file stays as it is.")]
pub(crate) struct SetArgs {
    /// An element's handler
    #[arg(value_name = "ELEMENT.HANDLER")]
    handler: String,

    /// Its new value, as in a graph file
    #[arg(allow_hyphen_values = true)]
    value: String,

    #[command(flatten)]
    which: WhichArgs,
}

/// Call a handler of a running element.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason call Disk.reset
  mason call --graph vm1 Disk.reset --json")]
pub(crate) struct CallArgs {
    /// An element's handler
    #[arg(value_name = "ELEMENT.HANDLER")]
    handler: String,

    /// What it is called with
    #[arg(default_value = "", allow_hyphen_values = true)]
    argument: String,

    #[command(flatten)]
    which: WhichArgs,
}

/// Whose handlers are meant, and how they are shown.
#[derive(clap::Args)]
struct WhichArgs {
    /// The graph's name, or the path of its file [default: the only one]
    #[arg(long, value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// The graph that is meant, and its handlers.
struct Known {
    client: Client,
    graph: GraphSummary,
    handlers: Vec<HandlerView>,
}

/// What a name means.
enum Meaning<'a> {
    Element(&'a str),
    Handler(&'a str, &'a str),
}

impl WhichArgs {
    fn known(&self) -> Outcome<Known> {
        let (client, _) = self.control.connect()?;
        let graph = find::graph(&client, self.graph.as_deref())?;
        let handlers = client.get(&path(&["v1", "graphs", &graph.name, "handlers"]))?;
        Ok(Known { client, graph, handlers })
    }

    fn show(&self, value: &HandlerValue) -> Outcome {
        match self.json {
            true => output::json(value),
            false if value.value.is_empty() => Ok(()),
            false => output::text(&(lines(&value.value) + "\n")),
        }
    }
}

impl Known {
    /// `Move.Copy.rate` is the handler `rate` of `Move.Copy` where there is such an element, else what follows
    /// the longest name of an element that it starts with.
    fn meaning<'a>(&self, name: &'a str) -> Outcome<Meaning<'a>> {
        let is_element = |name: &str| self.handlers.iter().any(|handler| handler.element == name);
        if is_element(name) {
            return Ok(Meaning::Element(name));
        }
        let dots = name.rmatch_indices('.').map(|(at, _)| (&name[..at], &name[at + 1..]));
        match dots.clone().find(|(element, _)| is_element(element)).or_else(|| dots.clone().next()) {
            Some((element, handler)) => Ok(Meaning::Handler(element, handler)),
            None => Err(self.no_element(name)),
        }
    }

    fn handler<'a>(&self, name: &'a str) -> Outcome<(&'a str, &'a str)> {
        match self.meaning(name)? {
            Meaning::Handler(element, handler) => Ok((element, handler)),
            Meaning::Element(element) => Err(Failure::Usage(format!(
                "{element} is an element: name one of its handlers, {element}.HANDLER"
            ))),
        }
    }

    fn no_element(&self, name: &str) -> Failure {
        let mut names: Vec<_> = self.handlers.iter().map(|handler| handler.element.as_str()).collect();
        names.dedup();
        let hint = blockmason::lang::did_you_mean(name, names);
        let hint = hint.map_or_else(String::new, |hint| format!("; {}", printable(&hint)));
        Failure::new(format!("{} has no element {name}{hint}", printable(&self.graph.name)))
    }

    fn path(&self, element: &str, handler: &str) -> String {
        path(&["v1", "graphs", &self.graph.name, "elements", element, "handlers", handler])
    }
}

pub(crate) fn get(args: &GetArgs) -> Outcome {
    let known = args.which.known()?;
    let wanted = args.handler.as_deref().map(|name| known.meaning(name)).transpose()?;
    if let Some(Meaning::Handler(element, handler)) = wanted {
        return args.which.show(&known.client.get(&known.path(element, handler))?);
    }
    let element = match wanted {
        Some(Meaning::Element(element)) => Some(element),
        _ => None,
    };
    let is_wanted = |handler: &&HandlerView| {
        handler.access != "call" && element.is_none_or(|element| handler.element == element)
    };
    let handlers: Vec<_> = known.handlers.iter().filter(is_wanted).collect();
    if args.which.json {
        return output::json(&handlers);
    }
    let name = |handler: &HandlerView| printable(&format!("{}.{}", handler.element, handler.handler));
    let width = handlers.iter().map(|handler| name(handler).len()).max().unwrap_or(0);
    let mut out = String::new();
    for handler in handlers {
        let value = match (&handler.value, &handler.error) {
            // Several lines stand below one another, as `mason get ELEMENT.HANDLER` writes them.
            (Some(value), _) => lines(value.trim_end()).replace('\n', &format!("\n{:width$}  ", "")),
            (None, error) => format!("({})", printable(error.as_deref().unwrap_or("unknown"))),
        };
        out += format!("{:width$}  {value}", name(handler)).trim_end();
        out.push('\n');
    }
    output::text(&out)
}

pub(crate) fn set(args: &SetArgs) -> Outcome {
    let known = args.which.known()?;
    let (element, handler) = known.handler(&args.handler)?;
    let value = HandlerValue { value: args.value.clone() };
    known.client.put::<()>(&known.path(element, handler), &value)?;
    if !args.which.json {
        return Ok(());
    }
    // As the element writes it.
    args.which.show(&known.client.get(&known.path(element, handler))?)
}

pub(crate) fn call(args: &CallArgs) -> Outcome {
    let known = args.which.known()?;
    let (element, handler) = known.handler(&args.handler)?;
    let argument = HandlerArgument { argument: args.argument.clone() };
    args.which.show(&known.client.post(&known.path(element, handler), &argument)?)
}

/// A text of several lines as it may be sent to a terminal.
fn lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}
