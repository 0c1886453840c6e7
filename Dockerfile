# The application in the box: one image for the API, the relay, the services and the migrations; they differ in command.
FROM python:3.13-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --upgrade 'pip>=25.1'
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY outbox outbox
RUN /venv/bin/pip install --no-cache-dir '.[rabbitmq,postgres,metrics,otel]' --group app

FROM python:3.13-slim-trixie
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A named volume mounted on the folder of the exports takes over its owner.
RUN useradd --uid 10001 --no-create-home openevent && install --directory --owner=openevent /var/lib/exports
COPY --from=build /venv /venv
WORKDIR /srv/openevent
# pyproject.toml holds the defaults of this application, such as the name of its exchange.
COPY pyproject.toml ./
COPY publisher publisher
COPY consumers consumers
USER openevent
EXPOSE 8000 9101
CMD ["gunicorn", "--bind", "0.0.0.0:8000", "--no-control-socket", "publisher:create_app()"]
