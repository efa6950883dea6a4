//! `mason top` on a terminal: what is shown, and what keys do. Nothing here touches a terminal.

use super::plain::{HEAD, cells};
use super::rates::{GraphRates, Row, View};
use crate::output::printable;
use crate::units::{Bytes, Seconds};
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table};

/// What is shown, and how.
#[derive(Default)]
pub(super) struct Screen {
    view: Option<View>,
    /// Why there is no newer look.
    trouble: Option<String>,
    /// The name of the graph that is shown; none before one was chosen.
    graph: Option<String>,
    scroll: usize,
    /// Rows that fit.
    page: usize,
    sort: Sort,
    filter: String,
    /// Keys go to the filter.
    filtering: bool,
    paused: bool,
    help: bool,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Sort {
    /// As in the graph file.
    #[default]
    Graph,
    Requests,
    Bytes,
    Time,
}

impl Sort {
    fn next(self) -> Sort {
        match self {
            Sort::Graph => Sort::Requests,
            Sort::Requests => Sort::Bytes,
            Sort::Bytes => Sort::Time,
            Sort::Time => Sort::Graph,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Sort::Graph => "graph",
            Sort::Requests => "req/s",
            Sort::Bytes => "bytes/s",
            Sort::Time => "time",
        }
    }

    fn key(self, row: &Row) -> f64 {
        match self {
            Sort::Graph => 0.0,
            Sort::Requests => row.requests_per_second,
            Sort::Bytes => row.bytes_per_second,
            Sort::Time => row.p99_ns.or(row.sampled_mean_ns).unwrap_or(0) as f64,
        }
    }
}

/// The least widths of the columns but the first.
const WIDTHS: [u16; 8] = [12, 9, 9, 8, 8, 9, 8, 12];

const HELP: &str = "\
q, Ctrl-C      quit
up, down       scroll a line
PgUp, PgDn     scroll a page
Home, End      to the beginning, to the end
tab            next graph (shift: the one before)
s              sort by: graph, req/s, bytes/s, time
/              show only names that contain a word; Enter keeps it, Esc takes it back
p              pause
h, ?           this

Rows without an operation are edges. ~ marks means of sampled requests:
from the edge down and back.";

impl Screen {
    /// Takes a new look, or why there is none.
    pub(super) fn look(&mut self, look: Result<View, String>) {
        match look {
            Ok(view) => {
                self.trouble = None;
                if !self.paused {
                    self.view = Some(view);
                }
            }
            Err(trouble) => self.trouble = Some(trouble),
        }
    }

    /// Takes a key. False if it ends the program.
    pub(super) fn key(&mut self, key: KeyEvent) -> bool {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return false;
        }
        if self.filtering {
            self.filter_key(key.code);
            return true;
        }
        match key.code {
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Char('q') => return false,
            KeyCode::Char('h' | '?') => self.help = !self.help,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('/') => (self.filtering, self.filter) = (true, String::new()),
            KeyCode::Tab => self.turn(1),
            KeyCode::BackTab => self.turn(-1),
            KeyCode::Up => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Down => self.scroll = self.scroll.saturating_add(1),
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(self.page),
            KeyCode::PageDown => self.scroll = self.scroll.saturating_add(self.page),
            KeyCode::Home => self.scroll = 0,
            KeyCode::End => self.scroll = usize::MAX,
            _ => {}
        }
        true
    }

    fn filter_key(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.filtering = false,
            KeyCode::Esc => (self.filtering, self.filter) = (false, String::new()),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(c) if self.filter.len() < 100 => self.filter.push(c),
            _ => {}
        }
    }

    fn turn(&mut self, by: isize) {
        let Some(view) = self.view.as_ref().filter(|view| !view.graphs.is_empty()) else { return };
        let next = (self.current(view) as isize + by).rem_euclid(view.graphs.len() as isize);
        self.graph = Some(view.graphs[next as usize].name.clone());
        self.scroll = 0;
    }

    /// The graph that is shown; another takes its place when it has gone.
    fn current(&self, view: &View) -> usize {
        view.graphs.iter().position(|graph| Some(&graph.name) == self.graph.as_ref()).unwrap_or(0)
    }

    /// Draws everything.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(3), Constraint::Min(0), Constraint::Length(1)])
                .areas(frame.area());
        let graph = self.view.as_ref().and_then(|view| view.graphs.get(self.current(view))).cloned();
        frame.render_widget(Paragraph::new(self.head(graph.as_ref())), head);
        if let Some(graph) = graph {
            self.table(frame, body, &graph);
        }
        frame.render_widget(self.foot(), foot);
        if self.help {
            help(frame);
        }
    }

    fn head(&self, graph: Option<&GraphRates>) -> Text<'static> {
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let Some(view) = &self.view else { return Text::raw("mason top") };
        let first = format!(
            "mason {}, process {}, up {}",
            printable(&view.version),
            view.pid,
            Seconds(view.uptime_seconds)
        );
        let Some(graph) = graph else {
            return Text::from(vec![Line::raw(first), Line::raw("no graph is served")]);
        };
        let (at, of) = (self.current(view) + 1, view.graphs.len());
        let failed = if graph.failed { "  FAILED: answers errors until it is reloaded" } else { "" };
        let name = format!("[{at}/{of}] {}  {}{failed}", printable(&graph.name), printable(&graph.file));
        let state = format!(
            "{} in flight ({}), 1/{} sampled  {}",
            graph.in_flight,
            Bytes(graph.in_flight_bytes),
            graph.sampled_every,
            printable(&graph.exports.join(" "))
        );
        Text::from(vec![Line::raw(first), Line::styled(name, bold), Line::raw(state)])
    }

    fn table(&mut self, frame: &mut Frame<'_>, area: Rect, graph: &GraphRates) {
        let filter = self.filter.to_lowercase();
        let mut rows: Vec<&Row> =
            graph.rows.iter().filter(|row| row.name.to_lowercase().contains(&filter)).collect();
        rows.sort_by(|a, b| self.sort.key(b).total_cmp(&self.sort.key(a)));
        self.page = usize::from(area.height.saturating_sub(1)).max(1);
        // The last row stays at the bottom, also when the window grows or rows go.
        self.scroll = self.scroll.min(rows.len().saturating_sub(self.page));
        let shown = rows.into_iter().skip(self.scroll).take(self.page).map(|row| {
            let style = match row.errors {
                Some(errors) if errors > 0 => Style::new().add_modifier(Modifier::BOLD),
                _ => Style::new(),
            };
            TableRow::new(aligned(cells(row))).style(style)
        });
        let widths = std::iter::once(Constraint::Min(16)).chain(WIDTHS.map(Constraint::Length));
        let head = aligned(HEAD.map(|name| name.to_uppercase()));
        let head = TableRow::new(head).style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_widget(Table::new(shown, widths).header(head), area);
    }

    fn foot(&self) -> Line<'static> {
        let reversed = Style::new().add_modifier(Modifier::REVERSED);
        if let Some(trouble) = &self.trouble {
            return Line::styled(format!("no answer: {}", printable(trouble)), reversed);
        }
        if self.filtering {
            return Line::raw(format!("/{}_", self.filter));
        }
        let mut text = format!("q quit  tab graph  s sort: {}  / filter", self.sort.name());
        if !self.filter.is_empty() {
            text += &format!(": {}", self.filter);
        }
        text += "  p pause  h help";
        if self.paused {
            text += "  PAUSED";
        }
        Line::raw(text)
    }
}

/// Numbers flush right.
fn aligned(cells: [String; 9]) -> impl Iterator<Item = Cell<'static>> {
    cells.into_iter().enumerate().map(|(ix, text)| {
        let text = Text::raw(text);
        Cell::new(if ix < 2 { text } else { text.right_aligned() })
    })
}

fn help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let lines = HELP.lines();
    let width = lines.clone().map(str::len).max().unwrap_or(0) as u16 + 4;
    let (width, height) = (width.min(area.width), (lines.count() as u16 + 2).min(area.height));
    let inner =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, inner);
    frame.render_widget(Paragraph::new(HELP).block(Block::bordered().title(" keys ")), inner);
}

#[cfg(test)]
mod tests {
    use super::super::rates::Rates;
    use super::super::rates::tests::counters;
    use super::*;
    use crate::counters::CountersView;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn view(change: impl Fn(&mut CountersView)) -> View {
        let mut rates = Rates::default();
        let [before, now] = [(10.0, 1000), (11.0, 1250)].map(|(uptime, requests)| {
            let mut counters = counters(7, uptime, requests);
            change(&mut counters);
            counters
        });
        rates.next(before);
        rates.next(now)
    }

    fn drawn(screen: &mut Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(row).collect()
    }

    fn press(screen: &mut Screen, codes: impl IntoIterator<Item = KeyCode>) {
        assert!(codes.into_iter().all(|code| screen.key(code.into())));
    }

    fn many(counters: &mut CountersView) {
        let edge = counters.graphs[0].edges[0].clone();
        for ix in 0..100u64 {
            let requests = edge.requests * ix / 100;
            let to = format!("E{ix:03}");
            counters.graphs[0].edges.push(crate::counters::EdgeCounters { to, requests, ..edge.clone() });
        }
    }

    #[test]
    fn one_graph() {
        let mut screen = Screen::default();
        screen.look(Ok(view(|_| ())));
        let lines = drawn(&mut screen, 110, 8);
        assert_eq!(lines[0], "mason 0, process 7, up 11.0s");
        assert_eq!(lines[1], "[1/1] vm  vm.mason");
        assert_eq!(lines[2], "0 in flight (0), 1/1024 sampled");
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&lines[3])[..4], ["NAME", "OPERATION", "REQ/S", "BYTES/S"]);
        assert_eq!(words(&lines[4]), ["Guest", "read", "250", "1000k", "1.0us", "1.0us", "-", "25", "1250"]);
        assert_eq!(
            words(&lines[5]),
            ["Guest", "->", "Disk", "250", "1000k", "-", "-", "~500ns", "-", "1250"]
        );
        assert!(lines[7].starts_with("q quit"), "{lines:?}");
    }

    #[test]
    fn any_size_is_drawn() {
        for (width, height) in [(1, 1), (3, 2), (10, 4), (40, 5), (80, 24), (300, 100)] {
            for paused in [false, true] {
                let mut screen = Screen::default();
                drawn(&mut screen, width, height);
                screen.look(Ok(view(many)));
                if paused {
                    press(&mut screen, [KeyCode::Char('p'), KeyCode::Char('h')]);
                }
                drawn(&mut screen, width, height);
            }
        }
    }

    #[test]
    fn nothing_and_trouble() {
        let mut screen = Screen::default();
        assert_eq!(drawn(&mut screen, 40, 6)[0], "mason top");
        screen.look(Ok(view(|counters| counters.graphs.clear())));
        assert_eq!(drawn(&mut screen, 40, 6)[1], "no graph is served");
        screen.look(Ok(view(|counters| counters.graphs[0].failed = true)));
        assert!(drawn(&mut screen, 80, 6)[1].contains("FAILED"));
        screen.look(Err("the daemon has \x1b[2Jgone".to_owned()));
        let lines = drawn(&mut screen, 80, 6);
        assert!(lines[1].contains("FAILED"), "what was known stays");
        assert_eq!(lines[5], "no answer: the daemon has ?[2Jgone");
        screen.look(Ok(view(|_| ())));
        assert!(drawn(&mut screen, 80, 6)[5].starts_with("q quit"), "and it is back");
    }

    #[test]
    fn many_rows_are_scrolled_sorted_and_filtered() {
        let mut screen = Screen::default();
        screen.look(Ok(view(many)));
        // Ten rows of 102.
        let names = |screen: &mut Screen| -> Vec<String> {
            drawn(screen, 110, 15)[4..14].iter().map(|line| line[..16].trim().to_owned()).collect()
        };
        assert_eq!(names(&mut screen)[..3], ["Guest", "Guest -> Disk", "Guest -> E000"]);
        press(&mut screen, [KeyCode::Down, KeyCode::PageDown]);
        assert_eq!(names(&mut screen)[0], "Guest -> E009");
        press(&mut screen, [KeyCode::End]);
        assert_eq!(names(&mut screen)[9], "Guest -> E099");
        press(&mut screen, [KeyCode::PageDown, KeyCode::Down]);
        assert_eq!(names(&mut screen)[9], "Guest -> E099", "there is no more");
        press(&mut screen, [KeyCode::Up]);
        assert_eq!(names(&mut screen)[9], "Guest -> E098");
        press(&mut screen, [KeyCode::Char('s'), KeyCode::Home]);
        assert_eq!(names(&mut screen)[..3], ["Guest", "Guest -> Disk", "Guest -> E099"]);
        press(&mut screen, "/e05q".chars().map(KeyCode::Char));
        press(&mut screen, [KeyCode::Backspace, KeyCode::Enter]);
        let found = names(&mut screen);
        assert_eq!((found[0].as_str(), found[9].as_str()), ("Guest -> E059", "Guest -> E050"));
        assert!(drawn(&mut screen, 110, 15)[14].contains("filter: e05"));
        press(&mut screen, [KeyCode::Esc]);
        assert_eq!(names(&mut screen)[0], "Guest");
        assert!(!screen.key(KeyCode::Char('q').into()));
        assert!(!screen.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn graphs_take_turns_and_a_pause_keeps_the_look() {
        let two = |counters: &mut CountersView| {
            let other = counters.graphs[0].clone();
            counters.graphs.push(crate::counters::GraphCounters { name: "other".into(), ..other });
        };
        let mut screen = Screen::default();
        screen.look(Ok(view(two)));
        press(&mut screen, [KeyCode::Tab]);
        assert!(drawn(&mut screen, 80, 6)[1].starts_with("[2/2] other"));
        press(&mut screen, [KeyCode::Tab, KeyCode::BackTab, KeyCode::Char('p')]);
        screen.look(Ok(view(|counters| counters.graphs.clear())));
        assert!(drawn(&mut screen, 80, 6)[1].starts_with("[2/2] other"), "paused");
        press(&mut screen, [KeyCode::Char('p')]);
        screen.look(Ok(view(|_| ())));
        assert!(drawn(&mut screen, 80, 6)[1].starts_with("[1/1] vm"), "the other has gone");
    }
}
