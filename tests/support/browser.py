"""Looks at pages in a real browser: Debian's chromium, driven by selenium. Where it is not installed, its tests are skipped."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.support.processes import free_port

_FLAGS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync --guest'  # whose first page asks for nothing outside
)
SIZES = ((1280, 900), (390, 844))
_MEASURE = """
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const heads = [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => Number(h.tagName[1]));
const broken = [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 60));
const unnamed = [...document.images].filter(i => !i.hasAttribute('alt')).length;
const paper = getComputedStyle(document.body).backgroundColor;
return [document.URL, wide, heads, broken, unnamed, paper, document.title];
"""


@dataclass(frozen=True)
class Seen:
    """A page as it was shown once.

    Attributes:
        url: of what is shown: the browser's own page if there is none at the address.
        overflow: by how many pixels it is wider than its window.
        headings: the levels of its headings, in order.
        broken, unnamed: pictures that did not load; how many have no alternative text.
        paper: its background colour, as CSS writes it.
        title: of the page.
        messages: what the console shows, errors and warnings.
        requests: all addresses that it asked for, data URIs left out.
    """

    url: str
    overflow: int
    headings: list[int]
    broken: list[str]
    unnamed: int
    paper: str
    title: str
    messages: list[str]
    requests: list[str]


@contextmanager
def started(folder):
    """A browser with an empty profile in ``folder``; skips the test if chromium, its driver or selenium is missing."""
    programs = [shutil.which(name) for name in ('chromium', 'chromedriver')]
    if None in programs:
        pytest.skip('no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)')
    driver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed (requirements/tests.txt)')
    options = driver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*_FLAGS.split(), f'--user-data-dir={folder}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    browser = driver.Chrome(options, driver.ChromeService(programs[1], port=int(free_port())))
    browser.get('about:blank')  # away from the browser's own first page
    try:
        yield browser
    finally:
        browser.quit()


def look(browser, address, width=1280, height=900, dark=False, screenshot=None):
    """Opens a page in a window of that size, in light or dark, and says what is seen."""
    scheme = [dict(name='prefers-color-scheme', value='dark' if dark else 'light')]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=scheme))
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    for log in ('browser', 'performance'):
        browser.get_log(log)  # of the page before
    browser.get(address)
    found = browser.execute_script(_MEASURE)
    events = [json.loads(line['message'])['message'] for line in browser.get_log('performance')]
    asked = [e['params'] for e in events if e['method'] == 'Network.requestWillBeSent']
    own = ('chrome', 'about:')  # the browser's pages
    asked = [e['request']['url'] for e in asked if not e['documentURL'].startswith(own)]
    messages = [line['message'] for line in browser.get_log('browser')]
    if screenshot:
        tall = dict(size, height=browser.execute_script('return document.documentElement.scrollHeight'))
        browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', tall)
        browser.save_screenshot(str(screenshot))
    return Seen(*found, messages, [url for url in asked if not url.startswith('data:')])


def faults(seen, address):
    """What is wrong with a page that should load nothing from outside its own address, in words."""
    found = [f'console: {message}' for message in seen.messages]
    if not seen.url.startswith(address):
        found.append(f'not the page, but {seen.url}')
    found += [f'request outside the page: {url}' for url in seen.requests if not url.startswith(address)]
    if seen.overflow > 0:
        found.append(f'{seen.overflow} pixels wider than the window')
    jumps = [f'{a} to {b}' for a, b in zip([0, *seen.headings], seen.headings) if b > a + 1]
    if jumps or seen.headings.count(1) != 1:
        found.append(f'headings out of order: {seen.headings}')
    if seen.broken or seen.unnamed:
        found.append(f'pictures that do not load: {seen.broken}; without a text: {seen.unnamed}')
    if not seen.title:
        found.append('no title')
    return found
