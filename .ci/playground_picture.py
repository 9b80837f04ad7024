"""Takes the picture of docs/playground.md from a running service.

    python .ci/playground_picture.py http://127.0.0.1:8000

Needs Chromium, chromedriver, selenium and Pillow. The service should be idle and have answered
before: the picture shows its times.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

PICTURE = Path(__file__).parent.parent / "docs" / "playground.png"
WIDTH, SCALE, COLOURS = 1060, 1.5, 256
KEEP_PERCENT = 10
RACES = 2  # the last one is shown: it is the one with an expected time
PATIENCE_S = 120.0
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


def main() -> None:
    """Select an example, race it, and save what the page shows from the selection on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the service, without a key")
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ARGUMENTS:
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        drive(driver, args.url)
        save(driver)
    finally:
        driver.quit()


def drive(driver: webdriver.Chrome, url: str) -> None:
    def click(name: str, until: str) -> None:
        driver.find_element(By.ID, name).click()
        wait = WebDriverWait(driver, PATIENCE_S, 0.1)
        wait.until(lambda _: driver.execute_script(f"return Boolean({until})"))

    size = {"width": WIDTH, "height": 900, "deviceScaleFactor": SCALE, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(f"{url}/playground")
    click("example", "document.getElementById('context').value")
    keep = f"document.getElementById('keep').value = {KEEP_PERCENT}"
    driver.execute_script(keep)
    click("select", "!document.getElementById('selection').hidden")
    for _ in range(RACES):
        click("run", "document.getElementById('stop').hidden")


def save(driver: webdriver.Chrome) -> None:
    """Save the selection and the race with a palette, which keeps the file small."""
    script = """
        const box = (id) => document.getElementById(id).getBoundingClientRect();
        return [box("selection").top + scrollY, box("race").bottom + scrollY];
    """
    top, bottom = driver.execute_script(script)
    clip = {"x": 0, "y": top - 12, "width": WIDTH, "height": bottom - top + 24, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        PICTURE, optimize=True
    )
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
